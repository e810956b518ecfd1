"""Math: is the response's answer equal to the ground truth as mathematics, by math-verify?

Invariant: math-verify's own time limits are off. They use signal.alarm, which fails outside the main thread and cannot
interrupt a C call; the pool's limit kills the process instead.
"""

import logging
from typing import Literal

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from grpo_worker.rewards.base import RewardInput, RewardResult

Method = Literal["flexible", "boxed"]
METHODS = ("flexible", "boxed")
_EXTRACTION = (LatexExtractionConfig(), ExprExtractionConfig())

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


def parse_ground_truth(text: str) -> list[object]:
    """The gold answer: bare (`\\frac{1}{2}`, `42`), in dollars, or a worked solution with a box.

    Raises:
        ValueError: math-verify reads no answer from it.
    """
    boxed = last_boxed(text) or (text if "$" in text else rf"\boxed{{{text}}}")
    gold = parse(boxed, extraction_config=_EXTRACTION, parsing_timeout=None)
    if not gold:
        raise ValueError(f"the ground truth {text[:80]!r} is not an answer that math-verify can read")
    return list(gold)


def math(sample: RewardInput, *, method: Method = "flexible", score: float = 1.0) -> RewardResult:
    r"""`score` when the answers are equal, else 0; `extra["parsed"]` tells a wrong answer from none.

    flexible: whatever answer math-verify finds (box, LaTeX, plain number). boxed: the last `\boxed{...}` only.
    """
    gold = parse_ground_truth(sample.ground_truth)
    text = sample.response if method == "flexible" else last_boxed(sample.response)
    answer = parse(text, extraction_config=_EXTRACTION, parsing_timeout=None) if text else []
    correct = bool(answer) and bool(verify(gold, answer, timeout_seconds=None))
    return RewardResult(score if correct else 0.0, accuracy=float(correct), extra={"parsed": float(bool(answer))})
