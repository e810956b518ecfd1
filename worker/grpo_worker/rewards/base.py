"""The types of a reward call, and the one place that decides what counts as a score.

Invariant: a `RewardResult` holds finite numbers only. Whatever else a function returns is an `InvalidRewardError` that
says what came back; it is never turned into a zero.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class RewardInput:
    """One response with everything a reward function may want to know of it. Picklable when `data` is.

    `data` holds the other columns of the prompt's row; `finish_reason` is the rollout engine's (`stop`, `length`, ...). `response` has no
    special tokens; `raw_response` has all but the one that ended it, for models whose `<think>` is one. `token_ids` are all that was sampled.
    """

    prompt: str
    response: str
    ground_truth: str
    data: dict[str, Any] = field(default_factory=dict)
    response_tokens: int = 0
    finish_reason: str = "stop"
    uid: str = ""
    raw_response: str = ""
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RewardResult:
    """`score` trains the policy, `accuracy` (0 to 1) is reported beside it, `extra` goes to the metrics. `answer` is what the function took as
    the response's answer, for the vote of `val/accuracy/maj@n`; empty where it found none."""

    score: float
    accuracy: float | None = None
    extra: dict[str, float] = field(default_factory=dict)
    answer: str | None = field(default=None, compare=False)


# A coroutine function where the person's own is one.
RewardFunction = Callable[[RewardInput], Any]


class TryAgain(Exception):
    """For a reward function to raise when what it asks is not there just now (a judge that answers 503, a full queue): this call is made
    again after a while, for `reward.retrySeconds` at most. The message says what was not there."""


class InvalidRewardError(ValueError):
    """A reward function returned something that is not a finite score."""


def as_result(value: object) -> RewardResult:
    """`value` as returned by a reward function: a number, a dict with `score` (and `acc`, `pred` as in verl), or a RewardResult.

    Numbers of numpy and torch count as numbers. Other entries of a dict become `extra` where they are finite numbers;
    texts and NaN, which says "not applicable", are left out.

    Raises:
        InvalidRewardError: there is no score, or the score or the accuracy is not a finite number.
    """
    if isinstance(value, RewardResult):
        accuracy = None if value.accuracy is None else _finite(value.accuracy, "accuracy")
        return replace(value, score=_finite(value.score, "score"), accuracy=accuracy, extra=_finite_only(value.extra))
    if isinstance(value, Mapping):
        if "score" not in value:
            raise InvalidRewardError(f"the dict returned has no 'score' (keys: {', '.join(map(str, value)) or 'none'})")
        accuracy = None if value.get("acc") is None else _finite(value["acc"], "acc")
        extra = {str(key): entry for key, entry in value.items() if key not in ("score", "acc", "pred")}
        answer = None if value.get("pred") is None else str(value["pred"])
        return RewardResult(_finite(value["score"], "score"), accuracy, _finite_only(extra), answer)
    return RewardResult(_finite(value, "score"))


def _number(value: object) -> float | None:
    if not isinstance(value, Real) and hasattr(value, "item"):
        try:
            value = value.item()  # a numpy bool, or a tensor or array of one element
        except (ValueError, RuntimeError):
            return None
    return float(value) if isinstance(value, Real) else None


def _finite(value: object, name: str) -> float:
    number = _number(value)
    if number is None:
        shown = repr(value)
        raise InvalidRewardError(f"the {name} is not a number: {type(value).__name__} {shown[:200]}")
    if not math.isfinite(number):
        raise InvalidRewardError(f"the {name} is {number}, not a finite number")
    return number


def _finite_only(extra: Mapping[str, object]) -> dict[str, float]:
    numbers = ((key, _number(entry)) for key, entry in extra.items())
    return {key: number for key, number in numbers if number is not None and math.isfinite(number)}
