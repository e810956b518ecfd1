"""GSM8K: does the response end in the right number?

Invariant: numbers are compared as exact values, so `1,234`, `$1234` and `1234.00` are one answer. Where verl and lm-eval compare texts, this
accepts more spellings of the right number and no other number. What a number is: `rewards/numbers.py`.
"""

from fractions import Fraction
from typing import Literal

from grpo_worker.rewards.base import RewardInput, RewardResult
from grpo_worker.rewards.numbers import as_text, number_at, numbers, only_number

Method = Literal["strict", "flexible"]
METHODS = ("strict", "flexible")
MARK = "####"


def check_options(method: str = "flexible", **_: object) -> None:
    """Raises ValueError when `method` is not one of METHODS."""
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")


def extract_number(text: str, method: Method = "flexible") -> Fraction | None:
    """The last number of `text` (flexible), or the number right after the last `####` (strict)."""
    if method == "strict":
        _, mark, tail = text.rpartition(MARK)
        found = number_at(tail) if mark else None
    else:
        *_, found = None, *numbers(text)
    return None if found is None else found.value


def parse_ground_truth(text: str) -> Fraction:
    """The one number of the text; of GSM8K's worked answer, of the line after the last `####`.

    Raises:
        ValueError: it holds none, or several.
    """
    _, mark, tail = text.rpartition(MARK)
    value = only_number(tail.strip().partition("\n")[0] if mark else text)
    if value is None:
        where = f" after {MARK}" if mark else ""
        raise ValueError(f"the ground truth {text[-80:]!r} does not hold exactly one number{where}")
    return value


def gsm8k(
    sample: RewardInput, *, method: Method = "flexible", score: float = 1.0, format_score: float = 0.0
) -> RewardResult:
    """`score` for the right number, `format_score` for another number, 0 for none.

    The ground truth is the number, or GSM8K's whole worked answer with `#### number` at its end.

    Raises:
        ValueError: the ground truth does not hold exactly one number.
    """
    gold = parse_ground_truth(sample.ground_truth)
    answer = extract_number(sample.response, method)
    if answer is None:
        return RewardResult(0.0, accuracy=0.0, answer="")
    correct = answer == gold
    return RewardResult(score if correct else format_score, accuracy=float(correct), answer=as_text(answer))
