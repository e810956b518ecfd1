"""events.jsonl: what happened in a run, for people and for the live view.

Invariant: an event is one line and one append of a bounded size, so the processes of a run can write to one file without a lock;
emitting never raises, and what the file cannot take still reaches stderr. In the background nobody waits for the disk: events are written
in order by a thread of their own, and a disk that hangs costs events, not the run.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from grpo_worker import logs

Level = Literal["info", "warning", "error"]
MAX_MESSAGE_CHARACTERS = 4000
MAX_WAITING_EVENTS = 10_000


class Event(TypedDict):
    """One line of events.jsonl. `time` is unix seconds, `reason` is CamelCase."""

    time: float
    role: str
    level: str
    reason: str
    message: str


class EventLog:
    """Appends the events of one process. May be used from any thread."""

    def __init__(self, path: Path, role: str, *, echo: bool = True, background: bool = False) -> None:
        """
        Args:
            echo: False writes to the file alone: whoever shows the file shows them.
            background: for a process with an event loop; `close` at the end.
        """
        self.path = path
        self.role = role
        self._echo = echo
        self._failing = False
        self._waiting: queue.Queue[Event | None] | None = None
        if background:
            self._waiting = queue.Queue(MAX_WAITING_EVENTS)
            self._thread = threading.Thread(target=self._write_waiting, name="events", daemon=True)
            self._thread.start()

    def emit(self, level: Level, reason: str, message: str) -> None:
        """Write the event to the file, and as a plain line to stderr (a child's stderr is its log)."""
        if len(message) > MAX_MESSAGE_CHARACTERS:
            message = message[: MAX_MESSAGE_CHARACTERS - 1] + "…"
        event = Event(time=round(time.time(), 3), role=self.role, level=level, reason=reason, message=message)
        if self._waiting is None:
            self._write(event)
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(event)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Write what waits, for so long at most."""
        if self._waiting is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=timeout_seconds)
            self._thread.join(timeout_seconds)

    def _write_waiting(self) -> None:
        assert self._waiting is not None
        while (event := self._waiting.get()) is not None:
            self._write(event)

    def _write(self, event: Event) -> None:
        if self._echo:
            _to_stderr(logs.line(event["time"], event["level"], event["message"], self.role, reason=event["reason"]))
        # A write that failed may have left half a line: the line break in front keeps the next event whole.
        line = ("\n" if self._failing else "") + json.dumps(event, ensure_ascii=False) + "\n"
        try:
            _append(self.path, line.encode("utf-8", errors="replace"))
        except OSError as error:
            if not self._failing:
                message = f"{self.path} cannot be written: {error.strerror}"
                _to_stderr(logs.line(event["time"], "warning", message, self.role))
            self._failing = True
        else:
            self._failing = False


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """The events after byte `offset`, and the offset for the next read.

    A last line without its line break is left for the next read; a line that is no event is skipped. A file that is shorter than
    `offset` was replaced and is read from its beginning; a missing file has no events.
    """
    try:
        with path.open("rb") as file:
            if offset > os.fstat(file.fileno()).st_size:
                offset = 0
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    events = [event for line in whole.splitlines() if (event := _parse(line)) is not None]
    return events, offset + len(whole)


def _parse(line: bytes) -> Event | None:
    try:
        raw: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(raw, Mapping) or "message" not in raw:
        return None
    moment = raw.get("time")
    return Event(
        time=float(moment) if isinstance(moment, int | float) else 0.0,
        role=str(raw.get("role", "")),
        level=str(raw.get("level", "info")),
        reason=str(raw.get("reason", "")),
        message=str(raw["message"]),
    )


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o664)
    try:
        written = os.write(descriptor, data)
        while written < len(data):
            written += os.write(descriptor, data[written:])
    finally:
        os.close(descriptor)


def _to_stderr(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return  # stderr is closed or its disk is full: there is no one left to tell
