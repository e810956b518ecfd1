"""Math: is the response's answer equal to the ground truth as mathematics, by math-verify?

Invariant: math-verify's own time limits are off. They use signal.alarm, which fails outside the main thread and cannot
interrupt a C call; the pool's limit kills the process instead.
"""

import logging
import re
from typing import Any, Literal

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Expr, FiniteSet, N

from grpo_worker.rewards.base import RewardInput, RewardResult

Method = Literal["flexible", "boxed"]
METHODS = ("flexible", "boxed")
RELATIVE_TOLERANCE = 1e-5
_EXTRACTION = (LatexExtractionConfig(), ExprExtractionConfig())
_MATH_IN_DOLLARS = re.compile(r"(?<!\\)\$.*(?<!\\)\$|\\\(|\\\[", re.DOTALL)
_TEXT_NUMBER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{\s*((?:\\?\$)?\s*[\d.,]+)\s*\}")
_SPACED_DIGITS = re.compile(r"(?<![\d.])\d{1,3}(\\,|[ \u00a0\u2009\u202f])\d{3}(?:\1\d{3})*(?!\d)")

# At each call without its own time limit math-verify warns that the caller needs one. We have one.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def check_options(method: str = "flexible", **_: object) -> None:
    """Raises ValueError when `method` is not one of METHODS."""
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")


def last_boxed(text: str) -> str | None:
    r"""The last complete `\boxed{...}` of `text`, braces balanced; None without one."""
    end = len(text)
    while (start := text.rfind(r"\boxed{", 0, end)) >= 0:
        depth = 0
        for position in range(start + len(r"\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start : position + 1]
        end = start
    return None


def parse_ground_truth(text: str) -> list[Any]:
    r"""The gold answer: bare (`\frac{1}{2}`, `42`, `\$5`), in dollars, or a worked solution with a box.

    Raises:
        ValueError: math-verify reads no answer from it.
    """
    gold = _parse(last_boxed(text) or (text if _MATH_IN_DOLLARS.search(text) else rf"\boxed{{{text}}}"))
    if not gold:
        raise ValueError(f"the ground truth {text[:80]!r} is not an answer that math-verify can read")
    return gold


def math(sample: RewardInput, *, method: Method = "flexible", score: float = 1.0) -> RewardResult:
    r"""`score` when the answers are equal, else 0; `extra["parsed"]` tells a wrong answer from none.

    flexible: the last box, without one whatever answer math-verify finds (LaTeX, plain number). boxed: the last `\boxed{...}` only. Where the
    truth is a set, a box for each of its members will do.
    """
    gold = parse_ground_truth(sample.ground_truth)
    box = last_boxed(sample.response)
    texts = [box or ("" if method == "boxed" else sample.response)]
    if box and any(isinstance(answer, FiniteSet) for answer in gold):
        texts.append(sample.response)
    answers = [answer for text in texts if text and (answer := _parse(text))]
    correct = any(_equal(gold, answer) for answer in answers)
    parsed = {"parsed": float(bool(answers))}
    return RewardResult(score if correct else 0.0, float(correct), parsed, str(answers[0][0]) if answers else "")


def _parse(text: str) -> list[Any]:
    """Expressions and their text, as math-verify reads them. Groups of digits behind thin or plain spaces, which it takes for factors, are
    joined, and numbers taken out of `\\text`."""
    text = _TEXT_NUMBER.sub(r"\1", text)
    text = _SPACED_DIGITS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    return list(parse(text, extraction_config=_EXTRACTION, parsing_timeout=None))


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    """math-verify rounds to 6 decimals, where all small numbers are 0: those are compared by their ratio."""
    if not verify(gold, answer, timeout_seconds=None):
        return False
    numbers = [value for side in (gold, answer) for value in side if isinstance(value, Expr) and value.is_number]
    if len(numbers) != 2 or numbers[0] == numbers[1]:
        return True
    first, second = (abs(N(value.doit())) for value in numbers)
    if not (first.is_comparable and second.is_comparable) or max(first, second) >= 1:
        return True
    return bool(abs(first - second) <= RELATIVE_TOLERANCE * max(first, second))
