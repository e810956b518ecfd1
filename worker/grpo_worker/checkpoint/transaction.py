"""One save: everything is written under a temporary name, and one rename makes it a checkpoint.

Invariants:
- Order of a commit: files sealed, manifest, rename, `latest`. A process killed between any two of its system calls leaves the
  checkpoints of before whole, the new one either whole or absent under its name, and `latest` naming one that exists.
- A save under way holds a lock on its temporary directory, which the kernel drops when the process dies: only unlocked leftovers
  are ever removed.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from grpo_worker.checkpoint.files import DIRECTORY_MODE, fsync_directory, make_directory
from grpo_worker.checkpoint.layout import (
    TEMPORARY_PREFIX,
    CheckpointName,
    list_checkpoints,
    set_latest,
)
from grpo_worker.checkpoint.manifest import Manifest, read_manifest, write_manifest
from grpo_worker.errors import CheckpointDamagedError, ConfigError
from grpo_worker.storage import CheckpointStorageError, storage_errors

_REPLACED_PREFIX = f"{TEMPORARY_PREFIX}replaced-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


class CheckpointTransaction:
    """A save of one step into `root`. Write below `path`, then `commit`; leaving the `with` block without it aborts.

    with CheckpointTransaction(root, epoch=0, step=20) as save:
        checksums = write_shards(save.path)
        save.commit(checksums)

    One transaction at a time in one root. A checkpoint that already has this name is replaced by the commit.
    """

    def __init__(self, root: Path, epoch: int, step: int, *, incarnation: int = 0) -> None:
        self.root = root
        self.name = CheckpointName(epoch, step)
        self.path = root / f"{TEMPORARY_PREFIX}{self.name}"
        self.final_path = root / str(self.name)
        self.incarnation = incarnation
        self._lock: int | None = None
        with storage_errors(root, f"saving {self.name}"):
            root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            if self.path.exists() and not _remove_unlocked(self.path):
                raise CheckpointStorageError(
                    f"checkpoint.path: another process is saving {self.name} into {root} now. "
                    "Give each job its own checkpoint.path, or wait until it is done."
                )
            make_directory(self.path)
            self._lock = _lock_directory(self.path)

    def commit(self, checksums: Mapping[str, str] | None = None) -> Manifest:
        """Make the files under `path` the checkpoint. Removes them again when that fails.

        Args:
            checksums: `xxh3:HEX` by relative path, as the writers took them; other files are hashed here.

        Raises:
            CheckpointStorageError, RetryableError: the file system refuses. CheckpointDamagedError: a file in `checksums` is missing.
        """
        if self._lock is None:
            raise RuntimeError(f"the save of {self.name} is over")
        try:
            with storage_errors(self.root, f"saving {self.name}"):
                manifest = write_manifest(
                    self.path,
                    checksums or {},
                    epoch=self.name.epoch,
                    step=self.name.step,
                    sequence=next_sequence(self.root),
                    incarnation=self.incarnation,
                )
                self._put_in_place()
                fsync_directory(self.root)
                set_latest(self.root, self.name)
        except BaseException:
            self.abort()
            raise
        self._release()
        return manifest

    def abort(self) -> None:
        """Remove what was written. Does nothing after a commit."""
        if self._lock is None:
            return
        self._release()
        shutil.rmtree(self.path, ignore_errors=True)  # what stays is removed as a leftover at the next start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def _put_in_place(self) -> None:
        """Rename; a checkpoint of the same name changes places with the new one in one system call, then it is removed."""
        if not self.final_path.exists():
            os.rename(self.path, self.final_path)
            return
        if not _exchange(self.path, self.final_path):
            # No exchange on this file system (NFS): for a moment the old one is away.
            aside = self.root / f"{_REPLACED_PREFIX}{self.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.final_path, aside)
            os.rename(self.path, self.final_path)
            os.rename(aside, self.path)
        shutil.rmtree(self.path, ignore_errors=True)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_leftovers(root: Path) -> list[str]:
    """Remove what killed saves and prunings left in `root`; the names removed. Directories of a live save stay."""
    removed = []
    with storage_errors(root, "removing leftovers"):
        for entry in sorted(root.iterdir()) if root.is_dir() else []:
            if not entry.name.startswith(TEMPORARY_PREFIX):
                continue
            replaced = root / entry.name.removeprefix(_REPLACED_PREFIX)
            if entry.name.startswith(_REPLACED_PREFIX) and not replaced.exists():
                os.rename(entry, replaced)  # killed while it made way for a new one that never came
                continue
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink(missing_ok=True)
            elif not _remove_unlocked(entry):
                continue
            removed.append(entry.name)
    return removed


def next_sequence(root: Path) -> int:
    """One more than the highest sequence number of the readable checkpoints in `root`."""
    highest = 0
    for directory in list_checkpoints(root):
        try:
            highest = max(highest, read_manifest(directory).sequence)
        except (CheckpointDamagedError, ConfigError):
            continue
    return highest + 1


def _lock_directory(directory: Path) -> int:
    """An open descriptor of `directory` that holds its lock. Where there are no locks (some network mounts) it holds none."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor


def _remove_unlocked(directory: Path) -> bool:
    """Remove the tree unless a live process holds its lock; whether it was removed."""
    try:
        descriptor = _lock_directory(directory)
    except BlockingIOError:
        return False
    try:
        shutil.rmtree(directory)
    finally:
        os.close(descriptor)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically (renameat2, Linux 3.15); False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
