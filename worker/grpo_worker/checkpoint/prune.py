"""checkpoint.keepLast.

Invariant: only complete checkpoints count and only they are removed; the one that `latest` names stays, so does the one that the
document names in checkpoint.resume, and so does whatever is not a checkpoint: damaged ones (evidence), temporary directories, a person's
own files.
"""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from grpo_worker.checkpoint.layout import TEMPORARY_PREFIX, latest, list_checkpoints
from grpo_worker.checkpoint.manifest import verify
from grpo_worker.checkpoint.resume import AUTO, named_checkpoint, newest_first
from grpo_worker.errors import CheckpointDamagedError, ConfigError
from grpo_worker.storage import storage_errors


def to_remove(newest_first: Sequence[str], kept: Collection[str], keep_last: int) -> list[str]:
    """Of complete checkpoints, the newest first, those that go: all but `keep_last`, and none of `kept`."""
    if keep_last < 1:
        raise ValueError(f"keep_last {keep_last} is less than 1")
    return [name for name in newest_first[keep_last:] if name not in kept]


def prune(root: Path, keep_last: int, resume: str = AUTO) -> list[Path]:
    """Remove old checkpoints, but never the one that `resume` (checkpoint.resume) names; the paths removed.

    Each is renamed first, so a half-removed one never looks like a checkpoint.
    """
    if len(list_checkpoints(root)) <= keep_last:
        return []
    complete = [directory.name for directory in newest_first(root) if _complete(directory)]
    spared = [path.resolve() for path in (latest(root), named_checkpoint(root, resume)) if path is not None]
    kept = {path.name for path in spared if path.parent == root.resolve()}
    removed = []
    with storage_errors(root, "removing old checkpoints"):
        for name in to_remove(complete, kept, keep_last):
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
