"""RFC 3339 times of the API and of the status.

Invariant: all times are aware and UTC; what is written can be read back and is not later than what was given, but by less than a second.
"""

import math
from datetime import UTC, datetime, timedelta


def parse(text: str | None) -> datetime | None:
    """The time in `text`; None when there is none or it is not one."""
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def text(time: datetime) -> str:
    """`2026-11-22T17:34:00Z`: whole seconds, as the API server writes them."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def from_unix(seconds: object) -> datetime | None:
    """A worker's `time.time()`."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def text_after(time: datetime, wait_seconds: float) -> str:
    """`time` and a wait, rounded up to a whole second: a limit is never early."""
    return text(time + timedelta(seconds=math.ceil(wait_seconds) if wait_seconds else 0))
