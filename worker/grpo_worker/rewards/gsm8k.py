"""GSM8K: does the response end in the right number?

Invariant: the numbers are compared as decimals, so `1,234`, `$1234` and `1234.00` are one answer. Where verl and
lm-eval compare texts, this accepts more spellings of the right number and no other number.
"""

import re
from decimal import Decimal
from typing import Literal

from grpo_worker.rewards.base import RewardInput, RewardResult

Method = Literal["strict", "flexible"]
METHODS = ("strict", "flexible")

# Commas group digits as in verl's `[0-9\.\,]+`. A minus right after a digit, letter or bracket is an operator: "3-4"
# ends in 4.
_NUMBER = r"(?:(?<![\w.)\]])[-\u2212])?\$?(?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
_ANY_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(rf"####[ \t]*(\$?{_NUMBER})")


def check_options(method: str = "flexible", **_: object) -> None:
    """Raises ValueError when `method` is not one of METHODS."""
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")


def extract_number(text: str, method: Method = "flexible") -> Decimal | None:
    """The last number of `text` (flexible), or the number after the last `####` (strict)."""
    found = (_MARKED_NUMBER if method == "strict" else _ANY_NUMBER).findall(text)
    return _decimal(found[-1]) if found else None


def gsm8k(
    sample: RewardInput, *, method: Method = "flexible", score: float = 1.0, format_score: float = 0.0
) -> RewardResult:
    """`score` for the right number, `format_score` for another number, 0 for none.

    The ground truth is the number, or GSM8K's whole worked answer with `#### number` at its end.

    Raises:
        ValueError: the ground truth holds no number.
    """
    gold = extract_number(sample.ground_truth, "strict")
    if gold is None:
        gold = extract_number(sample.ground_truth)
    if gold is None:
        raise ValueError(f"the ground truth {sample.ground_truth[:80]!r} holds no number")
    answer = extract_number(sample.response, method)
    if answer is None:
        return RewardResult(0.0, accuracy=0.0)
    correct = answer == gold
    return RewardResult(score if correct else format_score, accuracy=float(correct))


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", "").replace("\u2212", "-"))
