"""Format: does the whole response have the shape that was asked for?

Invariant: the pattern has to match the response from end to end (outer blanks aside), so text around a well-formed part
earns nothing. It says nothing about the answer being right, hence no accuracy.
"""

import re

from grpo_worker.rewards.base import RewardInput, RewardResult

# Neither part may hold any of the four tags again: a second <answer> is not hidden inside the first one.
_TEXT = r"(?:(?!</?(?:think|answer)>).)*"
THINK_ANSWER = rf"<think>{_TEXT}</think>\s*<answer>{_TEXT}</answer>"


def check_options(pattern: str = THINK_ANSWER, **_: object) -> None:
    """Raises ValueError when `pattern` is not a regular expression."""
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern: {pattern!r} is not a regular expression ({error})") from error


def format_match(sample: RewardInput, *, pattern: str = THINK_ANSWER, weight: float = 1.0) -> RewardResult:
    """`weight` when `pattern` (Python's `re`, with `.` matching newlines) matches the whole response with its special tokens, else 0."""
    matched = re.compile(pattern, re.DOTALL).fullmatch((sample.raw_response or sample.response).strip())
    return RewardResult(weight if matched else 0.0)
