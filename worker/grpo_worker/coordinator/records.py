"""ledger.jsonl and samples.jsonl: which prompts each step trained on, and what the model wrote.

Invariant: after a resume at step S the files hold nothing of a later step, so the ledger counts each trained prompt once.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_worker.checkpoint import storage_errors


class StepRecords:
    """A file of JSON lines that each carry their `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Opens the file, cutting off what came after `resume_step` (-1: everything)."""
        self.path = path
        with storage_errors(path.parent, f"opening {path.name}"):
            if path.exists():
                self._cut(resume_step)
            self._file = path.open("ab", buffering=0)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one line. Raises ConfigError when the disk is full."""
        line = json.dumps({"step": step, **record}, ensure_ascii=False) + "\n"
        with storage_errors(self.path.parent, f"writing {self.path.name}"):
            self._file.write(line.encode("utf-8", errors="replace"))

    def close(self) -> None:
        self._file.close()

    def _cut(self, resume_step: int) -> None:
        data = self.path.read_bytes()
        kept = b"".join(line for line in data.splitlines(keepends=True) if _step(line) <= resume_step)
        if kept != data:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_bytes(kept)
            os.replace(temporary, self.path)


def _step(line: bytes) -> float:
    """The line's step; a torn line sorts after every step."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
