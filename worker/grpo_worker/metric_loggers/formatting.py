"""Numbers as people read them: durations, counts, the one-line summary of a step.

Invariant: a missing value is left out or shown as a dash, never as 0.
"""

import itertools
from collections.abc import Sequence

DASH = "–"
_BLOCKS = "▁▂▃▄▅▆▇█"


def format_duration(seconds: float | None) -> str:
    """`8.1 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    if seconds is None:
        return DASH
    seconds = max(0.0, seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_number(value: float | None, digits: int = 3) -> str:
    """Plain where that is short (`0.412`, `1,234`), scientific where plain would be zeros (`3.1e-05`)."""
    if value is None:
        return DASH
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size == 0 or size >= 0.5 * 10 ** (1 - digits):
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def step_line(
    step: int,
    *,
    total_steps: int | None = None,
    epoch: float | None = None,
    reward: float | None = None,
    accuracy: float | None = None,
    response_length: float | None = None,
    kl: float | None = None,
    tokens_per_second: float | None = None,
    step_seconds: float | None = None,
) -> str:
    """`step 12/200  epoch 0.40  reward 0.412  accuracy 0.530  length 123.4  KL 0.0012  1,234 tok/s  8.1 s`."""
    parts = [f"step {step}" + (f"/{total_steps}" if total_steps else "")]
    if epoch is not None:
        parts.append(f"epoch {epoch:.2f}")
    labelled = (("reward", reward, 3), ("accuracy", accuracy, 3), ("length", response_length, 1), ("KL", kl, 4))
    parts += [f"{label} {format_number(value, digits)}" for label, value, digits in labelled if value is not None]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tok/s")
    if step_seconds is not None:
        parts.append(format_duration(step_seconds))
    return "  ".join(parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as block characters; when there are more than `width`, each character is the mean of its share."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[3] * count
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)
