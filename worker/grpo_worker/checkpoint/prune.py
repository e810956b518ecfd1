"""checkpoint.keepLast.

Invariant: only complete checkpoints count and only they are removed; the one that `latest` names stays, and so does whatever is not
a checkpoint: damaged ones (evidence), temporary directories, a person's own files.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from grpo_worker.checkpoint.layout import TEMPORARY_PREFIX, latest, list_checkpoints
from grpo_worker.checkpoint.manifest import verify
from grpo_worker.checkpoint.resume import newest_first
from grpo_worker.checkpoint.storage import storage_errors
from grpo_worker.errors import CheckpointDamagedError, ConfigError


def to_remove(newest_first: Sequence[str], latest_name: str | None, keep_last: int) -> list[str]:
    """Of complete checkpoints, the newest first, those that go: all but `keep_last`, and never `latest_name`."""
    if keep_last < 1:
        raise ValueError(f"keep_last {keep_last} is less than 1")
    return [name for name in newest_first[keep_last:] if name != latest_name]


def prune(root: Path, keep_last: int) -> list[Path]:
    """Remove old checkpoints; the paths removed. Each is renamed first, so a half-removed one never looks like a checkpoint."""
    if len(list_checkpoints(root)) <= keep_last:
        return []
    complete = [directory.name for directory in newest_first(root) if _complete(directory)]
    newest = latest(root)
    removed = []
    with storage_errors(root, "removing old checkpoints"):
        for name in to_remove(complete, newest.name if newest else None, keep_last):
            doomed = root / f"{TEMPORARY_PREFIX}pruned-{name}"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(root / name, doomed)
            shutil.rmtree(doomed)
            removed.append(root / name)
    return removed


def _complete(directory: Path) -> bool:
    try:
        verify(directory, deep=False)
    except (CheckpointDamagedError, ConfigError):
        return False
    return True
