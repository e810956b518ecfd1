"""What happens to rewards before advantages: DAPO's overlong penalty and dynamic sampling (arXiv 2503.14476).

Invariant: pure functions of lengths and rewards; a dropped group is dropped whole.
"""

from collections.abc import Sequence

from torch import Tensor

from grpo_worker.errors import DataError, UsageError

SIGNAL_TOLERANCE = 1e-8


def overlong_penalty(
    response_lengths: Tensor, max_response_tokens: int, buffer_tokens: int, penalty_factor: float = 1.0
) -> Tensor:
    """Soft overlong punishment (eq. 13), to be added to the rewards: `[sequences]`, in [-penalty_factor, 0].

    0 up to max_response_tokens - buffer_tokens, then linear, -penalty_factor at max_response_tokens and beyond.
    """
    if not 0 < buffer_tokens <= max_response_tokens:
        raise UsageError(
            f"overlong buffer: must be in (0, {max_response_tokens}] tokens (the response limit), got {buffer_tokens}."
        )
    excess = response_lengths - (max_response_tokens - buffer_tokens)
    return -(excess / buffer_tokens).clamp(0, 1) * penalty_factor


def has_signal(metric_values: Sequence[float], tolerance: float = SIGNAL_TOLERANCE) -> bool:
    """Whether a group's metric (score, accuracy) varies by more than `tolerance`, so that its advantages are not all 0.

    A group of one has signal: without a baseline its advantage is its reward (as in verl).
    """
    if not metric_values:
        raise DataError("A group without responses was asked for its signal.")
    return len(metric_values) == 1 or max(metric_values) - min(metric_values) > tolerance
