"""One file of a checkpoint: its checksum, its mode, and that it is on the disk.

Invariant: whoever writes a file seals it. A sealed file is durable and readable by the group, whatever the umask was, so a process of
another user may load it.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

import xxhash

FILE_MODE = 0o640
DIRECTORY_MODE = 0o750
CHECKSUM_PREFIX = "xxh3:"
_CHUNK_BYTES = 4 * 1024 * 1024


class HashingReader:
    """An open file that is hashed as it is read: read in rising order, each byte comes from the disk once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = xxhash.xxh3_64()
        self._hashed_bytes = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        self._hash_up_to(start)
        return self._seen(start, self._file.read(size))

    def readline(self) -> bytes:
        start = self._file.tell()
        self._hash_up_to(start)
        return self._seen(start, self._file.readline())

    def checksum(self) -> str:
        """Of the whole file, in the manifest's form; reads what nobody has read yet."""
        self._hash_up_to(None)
        return CHECKSUM_PREFIX + self._digest.hexdigest()

    def _seen(self, start: int, data: bytes) -> bytes:
        self._digest.update(memoryview(data)[self._hashed_bytes - start :])
        self._hashed_bytes = max(self._hashed_bytes, start + len(data))
        return data

    def _hash_up_to(self, end: int | None) -> None:
        """Hash what lies before `end` (None: the end of the file) and was not read; the position is `end` then."""
        if end is not None and end <= self._hashed_bytes:
            return
        self._file.seek(self._hashed_bytes)
        while end is None or self._hashed_bytes < end:
            limit = _CHUNK_BYTES if end is None else min(_CHUNK_BYTES, end - self._hashed_bytes)
            if not (data := self._file.read(limit)):
                return
            self._digest.update(data)
            self._hashed_bytes += len(data)


def checksum_file(path: Path) -> str:
    """`xxh3:` and the 64-bit XXH3 of the file in 16 hex digits."""
    with open(path, "rb", buffering=0) as file:
        return HashingReader(file).checksum()


def seal(path: Path) -> str:
    """Make the file durable and readable by the group; its checksum."""
    checksum = checksum_file(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    share(path, FILE_MODE)
    return checksum


def share(path: Path, mode: int) -> None:
    """Add `mode` to the permissions; setgid and wider modes stay."""
    held = stat.S_IMODE(path.stat().st_mode)
    if held & mode != mode:
        path.chmod(held | mode)


def make_directory(path: Path) -> None:
    path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    share(path, DIRECTORY_MODE)


def fsync_directory(directory: Path) -> None:
    """Make the directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
