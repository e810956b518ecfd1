"""Can checkpoints be saved here? Asked before the first step, not after the first hour.

Invariant: when `preflight` returns, a file has been made, written, synced and removed in the directory.
"""

import os
import tempfile
from pathlib import Path

from grpo_worker.checkpoint.files import DIRECTORY_MODE
from grpo_worker.checkpoint.layout import TEMPORARY_PREFIX
from grpo_worker.storage import CheckpointStorageError, free_bytes, gib, storage_errors


def preflight(root: Path, needed_bytes: int) -> None:
    """Make the directory if need be and check that it can take a checkpoint of `needed_bytes`.

    Raises:
        CheckpointStorageError: a ConfigError that names checkpoint.path and what to change.
        RetryableError: the file system does not answer as it should (EIO, ESTALE).
    """
    for path in (root, *root.parents):
        if path.exists() and not path.is_dir():
            raise CheckpointStorageError(
                f"checkpoint.path: {path} is a file. Remove it, or set checkpoint.path to a directory."
            )
    with storage_errors(root, f"making the directory {root}"):
        root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    with storage_errors(root, f"writing a test file in {root}"):
        descriptor, name = tempfile.mkstemp(prefix=f"{TEMPORARY_PREFIX}preflight-", dir=root)
        try:
            os.write(descriptor, b"checkpoint preflight\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(name)
        free = free_bytes(root)
    if free < needed_bytes:
        raise CheckpointStorageError(
            f"checkpoint.path: {root} has {gib(free)} free, and one checkpoint needs {gib(needed_bytes)}. "
            "Free space there, or set checkpoint.path to a larger volume."
        )
