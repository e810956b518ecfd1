"""Files that appear whole, and what the operating system says about storage as an error that says what to do.

Invariant: only the file systems' own errors are translated; everything else passes unchanged.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_worker.errors import ConfigError, RetryableError

CHECKPOINTS = "checkpoint.path"
GIB = 1024**3
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM}


class CheckpointStorageError(ConfigError):
    """The checkpoint storage is full, read-only or not ours to write. A restart alone does not help."""

    reason = "CheckpointStorage"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path that is given: it takes the place of `path`, durable, when the block is over, and goes when the block fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def storage_errors(root: Path, doing: str, setting: str = CHECKPOINTS) -> Iterator[None]:
    """Turn an OSError of the block into a ConfigError, or RetryableError for what may pass (EIO, ESTALE, ...)."""
    try:
        yield
    except OSError as error:
        raise as_storage_error(error, root, doing, setting) from error


def as_storage_error(
    error: OSError, root: Path, doing: str, setting: str = CHECKPOINTS
) -> ConfigError | RetryableError:
    """The error for a person.

    Args:
        doing: what was tried, such as `saving epoch_0_step_20`.
        setting: what says where `root` is.
    """
    kind = CheckpointStorageError if setting == CHECKPOINTS else ConfigError
    what = f"{setting}: {doing} failed: {error.strerror or error}"
    change = f"set {setting}" if setting == CHECKPOINTS else f"move {setting}"
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return kind(
            f"{what}{where}. {root} has {free_text(root)} free. Free space there, lower checkpoint.keepLast, "
            f"or {change} to a larger volume; the last whole checkpoint is kept."
        )
    if error.errno == errno.EROFS:
        return kind(
            f"{what}{where}. {root} is on a read-only file system. Mount it writable, or {change} to another directory."
        )
    if error.errno in _FORBIDDEN:
        return kind(
            f"{what}{where}. User {os.geteuid()}, group {os.getegid()} may not write there. Change the owner or mode of {root} "
            f"(in Kubernetes: securityContext.fsGroup), or {change} to another directory."
        )
    if error.errno in {errno.ENOTDIR, errno.EEXIST}:
        return kind(f"{what}{where}. A file is in the way. Remove it, or {change} to a directory.")
    return RetryableError(f"{what}{where}. Is the volume of {root} still mounted and healthy?")


def free_bytes(directory: Path) -> int:
    """Bytes that an unprivileged process may still write."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def free_text(directory: Path) -> str:
    """`3.2 GiB`, or `an unknown amount` when the file system does not answer."""
    try:
        return gib(free_bytes(directory))
    except OSError:
        return "an unknown amount"


def gib(size_bytes: int) -> str:
    """`size_bytes` in GiB, with enough digits for small sizes."""
    value = size_bytes / GIB
    return f"{value:.1f} GiB" if value >= 1 or value == 0 else f"{value:.2g} GiB"
