"""metrics.jsonl, ledger.jsonl, samples.jsonl and spans.jsonl: JSON lines that each carry their `step`, the run's memory.

Invariant: the files hold whole lines of this run alone. A run that goes on from step S first sets aside what they hold of later steps, so
the ledger counts each trained prompt once; a run that starts anew sets everything aside. Nothing that was written whole is deleted,
but for old spans.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_worker.storage import storage_errors, whole_file

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class SetAside:
    """Lines of steps `first` to `last`, and the files that they are in now."""

    files: Sequence[Path]
    first: int
    last: int


def set_aside(paths: Sequence[Path], keep: int) -> SetAside | None:
    """Move the lines of steps after `keep` (-1: all) to `NAME.N.jsonl`, with one new N for all files; None when there are none.

    Lines that a kill tore are dropped. Raises ConfigError, RetryableError.
    """
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    moved, steps = [], set[int]()
    for path in paths:
        if not path.is_file():
            continue
        with storage_errors(path.parent, f"reading {path.name}", "the run directory"):
            kept, later, torn = _divide(path, keep)
            if later:
                moved.append(_numbered(path, number))
                steps.update(step for step, _ in later)
                with whole_file(moved[-1]) as temporary:
                    temporary.write_bytes(b"".join(line for _, line in later))
            if later or torn:
                with whole_file(path) as temporary:
                    temporary.write_bytes(b"".join(kept))
    return SetAside(moved, min(steps), max(steps)) if moved else None


def _numbered(path: Path, number: int) -> Path:
    return path.with_suffix(f".{number}{path.suffix}")


def _divide(path: Path, keep: int) -> tuple[list[bytes], list[tuple[int, bytes]], bool]:
    """Lines up to step `keep`, later ones, and whether there is anything that is no line."""
    kept, later, torn = [], [], False
    for line in path.read_bytes().splitlines(keepends=True):
        step = _step_of(line)
        if step is None:
            torn = True
        elif step <= keep:
            kept.append(line)
        else:
            later.append((step, line))
    return kept, later, torn


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


class StepFile:
    """Appends; a line is in the file when `write` returns."""

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        """`keep_bytes`: over this size the older half of the lines goes, of a file that is only of use for a while."""
        self.path = path
        self._keep_bytes = keep_bytes
        self._places: dict[int, int] = {}  # where each step that was written here begins
        with storage_errors(path.parent, f"opening {path.name}", "the run directory"):
            self._file = path.open("ab", buffering=0)

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, step: int, record: Mapping[str, Any], *, anew: bool = False) -> None:
        """Append one line; with `anew` in place of what was written of this step and after it. Raises ConfigError when the disk is
        full."""
        data = (json.dumps({"step": step, **record}, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        with storage_errors(self.path.parent, f"writing {self.path.name}", "the run directory"):
            if anew and step in self._places:
                os.ftruncate(self.fileno(), self._places[step])
                self._places = {earlier: place for earlier, place in self._places.items() if earlier < step}
            self._places.setdefault(step, os.fstat(self.fileno()).st_size)
            while data:
                data = data[os.write(self.fileno(), data) :]
            if self._keep_bytes is not None and os.fstat(self.fileno()).st_size > self._keep_bytes:
                self._halve()

    def close(self) -> None:
        self._file.close()

    def _halve(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        with whole_file(self.path) as temporary:
            temporary.write_bytes(b"".join(lines[(len(lines) + 1) // 2 :]))
        self.close()
        self._file, self._places = self.path.open("ab", buffering=0), {}


class JsonlLogger(StepFile):
    """`<run_dir>/metrics.jsonl`: one line a step."""

    name = "jsonl"

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / FILE_NAME)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises ConfigError when the disk is full."""
        self.write(step, {key: _plain(value) for key, value in metrics.items() if key != "step"}, anew=True)


def _plain(value: Any) -> int | float | None:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
