"""Seconds by part, of a step or of a start.

Invariant: parts are measured where they are waited for, so those of one timer do not overlap.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_worker.coordinator.spans import Spans


class Timer:
    """Counts from `since` (monotonic; default now)."""

    def __init__(self, since: float | None = None, spans: Spans | None = None) -> None:
        """`spans`: gets one of each part."""
        self.seconds: dict[str, float] = {}
        self._spans = spans or Spans()
        self._started = time.monotonic() if since is None else since

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            with self._spans.of("step", name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def elapsed(self) -> float:
        return time.monotonic() - self._started


class StartupTimer(Timer):
    """From the start of the process to its first step; told once."""

    def __init__(self) -> None:
        super().__init__(process_started())
        self.seconds["process"] = self.elapsed()
        self._told = False

    def first_step(self, step: Timer) -> dict[str, float]:
        """`startup_s/*` at the end of the first `step` of this life; nothing after that."""
        if self._told:
            return {}
        self._told = True
        parts = {**self.seconds, "first_step": step.elapsed(), "total": self.elapsed()}
        return {f"startup_s/{part}": seconds for part, seconds in parts.items()}


def process_started() -> float:
    """When this process was started, on the monotonic clock: imports come before the first line that could ask for the time."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])  # proc(5): starttime
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        age = 0.0  # no /proc here: the imports are not seen
    return time.monotonic() - age
