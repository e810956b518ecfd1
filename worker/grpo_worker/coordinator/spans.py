"""Who did what from when to when: the coordinator's waits, what it asked of each process, and rewards, on its own clock.

Invariant: recording costs no request and cannot fail; what is not taken at the end of a step is not kept for ever.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_SPANS = 20_000  # of one step; the oldest go first
SPANS_BYTES = 16 << 20  # of a run's spans.jsonl


class Spans:
    """Of the step under way."""

    def __init__(self) -> None:
        self._ended: deque[dict[str, Any]] = deque(maxlen=MAX_SPANS)

    @contextmanager
    def of(self, track: str, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """The block is a span on `track`: a process's name, `step` or `rewards`. It may add to the span's facts."""
        began, clock = time.time(), time.monotonic()
        try:
            yield facts
        finally:
            seconds = round(time.monotonic() - clock, 6)
            self._ended.append({"track": track, "name": name, "start": round(began, 6), "seconds": seconds, **facts})

    def take(self) -> list[dict[str, Any]]:
        """Those that ended since the last call, in the order of their ends."""
        taken = list(self._ended)
        self._ended.clear()
        return taken
