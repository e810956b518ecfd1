"""Host memory that one process fills and others of its container read: a pull's for all workers of an engine, a sender's for its receiver.

Invariant: there is no file system behind it: the memory has no name in /dev/shm (whose size limit in a pod is a trap), and it goes with the
process.
"""

import mmap
import os


class HostMemory:
    """Anonymous memory that other processes of this container map by its path below /proc."""

    def __init__(self) -> None:
        self._file = os.memfd_create("grpo-weights")
        self._map: mmap.mmap | None = None

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def reserve(self, total_bytes: int) -> memoryview:
        """At least `total_bytes` writable bytes. What was there before is kept or lost: only a verified pull gives it
        meaning."""
        size = max(total_bytes, 1)
        if self._map is None or len(self._map) < size:
            os.ftruncate(self._file, size)
            self._map = mmap.mmap(self._file, size)
        return memoryview(self._map)[:total_bytes]

    def close(self) -> None:
        self._map = None  # unmapped with the last view of it
        os.close(self._file)
