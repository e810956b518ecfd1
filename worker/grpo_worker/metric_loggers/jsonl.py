"""metrics.jsonl: one JSON object a step, the run's memory that the report is made from.

Invariant: the file holds each step once, in rising order, in whole lines. So a resumed run first cuts off what was logged after its
checkpoint, and a line that a kill tore is dropped.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_worker.errors import ConfigError

FILE_NAME = "metrics.jsonl"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class JsonlLogger:
    """Appends to `<run_dir>/metrics.jsonl`, one write a line."""

    name = "jsonl"

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self.path = run_dir / FILE_NAME
        with _naming(self.path):
            self._last_step = cut_after(self.path, lambda step: step <= resume_step)
            self._file = self._open()

    def fileno(self) -> int:
        return self._file.fileno()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises ConfigError when the disk is full. A step that is there already replaces its line and all after it."""
        line = json.dumps({"step": step, **{key: _plain(value) for key, value in metrics.items() if key != "step"}})
        with _naming(self.path):
            if self._last_step is not None and step <= self._last_step:
                self._file.close()
                cut_after(self.path, lambda kept: kept < step)
                self._file = self._open()
            _write_all(self._file.fileno(), line.encode() + b"\n")
        self._last_step = step

    def close(self) -> None:
        self._file.close()

    def _open(self) -> Any:
        return self.path.open("ab", buffering=0)


def cut_after(path: Path, keep: Callable[[int], bool]) -> int | None:
    """Keep the whole lines whose step passes `keep`; returns the highest step kept. Rewrites, atomically, only when lines go."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    kept: list[bytes] = []
    last: int | None = None
    for line in data.splitlines(keepends=True):
        step = _step_of(line)
        if step is not None and keep(step) and (last is None or step > last):
            kept.append(line)
            last = step
    result = b"".join(kept)
    if result != data:
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(result)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return last


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        raw = json.loads(line)
    except ValueError:
        return None
    step = raw.get("step") if isinstance(raw, dict) else None
    return step if isinstance(step, int) else None


def _plain(value: Any) -> int | float | None:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _write_all(descriptor: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])


class _naming:
    """Turns "no space" and "not allowed" into a ConfigError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise ConfigError(
                f"{self.path}: {error.strerror}. Free space on this disk and start the run again; "
                "it goes on from its last checkpoint."
            ) from error
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            raise ConfigError(
                f"{self.path}: {error.strerror}. Make the run directory writable, or choose another one."
            ) from error
