"""The trainer's published weights in host memory.

Invariant: the bytes of a version do not change while somebody reads them. There are two buffers: while one is served,
the other is written; a writer that would overwrite a version that is still being pulled waits, up to its limit, then
fails naming the readers. From when it waits that version has no new readers: one who comes late is sent to the current one.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
import xxhash

from grpo_worker.errors import DataError, StalledError
from grpo_worker.weightsync.manifest import SnapshotManifest, TensorEntry, TensorSpec, VersionNotHeldError, layout

CHUNK_BYTES = 256 << 10  # copied and hashed at a time


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class _Buffer:
    memory: torch.Tensor  # uint8 [bytes]; pinned when there is a GPU
    manifest: SnapshotManifest | None = None  # None: empty or being written
    readers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """A version that is held for one reader."""

    manifest: SnapshotManifest
    data: memoryview  # [total_bytes], read-only


class SnapshotStore:
    """Two host buffers, the newest complete version in one of them."""

    def __init__(self, *, hash_threads: int = 4, timeout_seconds: float = 300.0) -> None:
        self._buffers: list[_Buffer] = []
        self._current: _Buffer | None = None
        self._writing = False
        self._changed = threading.Condition()
        self._timeout_seconds = timeout_seconds
        self._hashers = ThreadPoolExecutor(hash_threads, thread_name_prefix="weight-hash")

    @property
    def current(self) -> SnapshotManifest | None:
        with self._changed:
            return self._current.manifest if self._current else None

    def held(self) -> list[int]:
        """Versions that can be read now, oldest first."""
        with self._changed:
            return sorted(buffer.manifest.version for buffer in self._buffers if buffer.manifest)

    def begin(self, version: int, specs: Sequence[TensorSpec]) -> "SnapshotWriter":
        """Start to write a version. Until `commit` the version before it stays the current one.

        Raises:
            StalledError: the other buffer is still being read after the limit.
            DataError: a name occurs twice, or a dtype is unknown.
        """
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise DataError(
                f"version {version}: tensor names occur twice: {sorted({n for n in names if names.count(n) > 1})[:5]}"
            )
        offsets, total = layout(specs)
        buffer = self._take_buffer(version, total)
        return SnapshotWriter(self, buffer, version, list(specs), offsets, total, self._hashers)

    @contextmanager
    def read(self, version: int, reader: str) -> Iterator[Snapshot]:
        """Hold a version for as long as the block runs.

        Raises:
            VersionNotHeldError: naming the versions that are held.
        """
        with self._changed:
            buffer = next((b for b in self._buffers if b.manifest and b.manifest.version == version), None)
            if buffer is None or buffer.manifest is None:
                raise VersionNotHeldError(f"version {version} is not held (held: {self.held_text()})")
            buffer.readers.append(reader)
            manifest = buffer.manifest
        try:
            yield Snapshot(manifest, _bytes(buffer.memory)[: manifest.total_bytes].toreadonly())
        finally:
            with self._changed:
                buffer.readers.remove(reader)
                self._changed.notify_all()

    def held_text(self) -> str:
        return ", ".join(str(version) for version in self.held()) or "none"

    def close(self) -> None:
        self._hashers.shutdown(wait=True, cancel_futures=True)

    def _take_buffer(self, version: int, total_bytes: int) -> _Buffer:
        deadline = time.monotonic() + self._timeout_seconds
        with self._changed:
            if self._writing:
                raise StalledError(
                    f"version {version} cannot be written: another version is being written. Commit or abandon it first."
                )
            others = [buffer for buffer in self._buffers if buffer is not self._current]
            if not others or len(self._buffers) < 2:
                buffer = _Buffer(_allocate(total_bytes))
                self._buffers.append(buffer)
            else:
                buffer = others[0]
                retired, buffer.manifest = buffer.manifest, None  # nobody new: who wants weights wants the current ones
                while buffer.readers:
                    if not self._changed.wait(deadline - time.monotonic()):
                        buffer.manifest = retired
                        raise StalledError(
                            f"version {version} cannot be written: an older version is still being pulled after "
                            f"{self._timeout_seconds:.0f} s by {', '.join(sorted(set(buffer.readers)))}"
                        )
                if buffer.memory.numel() < total_bytes:
                    buffer.memory = _allocate(total_bytes)
            buffer.manifest = None
            self._writing = True
            return buffer

    def _finish(self, buffer: _Buffer, manifest: SnapshotManifest | None) -> None:
        with self._changed:
            buffer.manifest = manifest
            if manifest is not None:
                self._current = buffer
            self._writing = False
            self._changed.notify_all()


class SnapshotWriter:
    """Fills one buffer. `write` each tensor once, then `commit`. As a context manager it abandons what was not
    committed."""

    def __init__(
        self,
        store: SnapshotStore,
        buffer: _Buffer,
        version: int,
        specs: list[TensorSpec],
        offsets: list[int],
        total_bytes: int,
        hashers: ThreadPoolExecutor,
    ) -> None:
        self._store, self._buffer, self._version = store, buffer, version
        self._specs, self._total_bytes = specs, total_bytes
        self._places = {spec.name: (spec, offset) for spec, offset in zip(specs, offsets, strict=True)}
        self._hashers = hashers
        self._hashes: dict[str, Future[int] | None] = {}  # None: copied from a GPU, hashed after the sync in commit
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abandon()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor into its place, cast to the announced dtype. The tensor must not change before `commit`: the
        copy goes on beside the caller.

        Raises:
            DataError: an unknown name, a second write, or another shape.
        """
        if name not in self._places:
            raise DataError(f"version {self._version}: tensor '{name}' was not announced")
        if name in self._hashes:
            raise DataError(f"version {self._version}: tensor '{name}' was written twice")
        spec, offset = self._places[name]
        if tuple(tensor.shape) != tuple(spec.shape):
            raise DataError(
                f"version {self._version}: tensor '{name}' has shape {list(tensor.shape)}, announced {list(spec.shape)}"
            )
        tensor = tensor.detach()
        if tensor.is_cuda:
            self._place(spec, offset).copy_(tensor, non_blocking=True)
            self._hashes[name] = None
        elif dtype_name(tensor.dtype) == spec.dtype and tensor.is_contiguous():
            self._hashes[name] = self._hashers.submit(self._copy_and_checksum, spec, offset, tensor)
        else:
            self._place(spec, offset).copy_(tensor)
            self._hashes[name] = self._hashers.submit(self._checksum, spec, offset)

    def commit(self) -> SnapshotManifest:
        """Make this version the current one.

        Raises:
            DataError: naming announced tensors that were not written (then nothing is published).
        """
        missing = [spec.name for spec in self._specs if spec.name not in self._hashes]
        if missing:
            self.abandon()
            raise DataError(
                f"version {self._version} is not published: {len(missing)} tensors were not written: {', '.join(missing[:5])}"
            )
        if any(future is None for future in self._hashes.values()):
            torch.cuda.synchronize()
        futures = [
            self._hashes[spec.name] or self._hashers.submit(self._checksum, *self._places[spec.name])
            for spec in self._specs
        ]
        entries = [
            TensorEntry(
                spec.name, tuple(spec.shape), spec.dtype, self._places[spec.name][1], spec.size_bytes, future.result()
            )
            for spec, future in zip(self._specs, futures, strict=True)
        ]
        manifest = SnapshotManifest(self._version, self._total_bytes, entries)
        self._open = False
        self._store._finish(self._buffer, manifest)
        return manifest

    def abandon(self) -> None:
        """Give the buffer back unpublished."""
        if self._open:
            self._open = False
            for future in self._hashes.values():
                if future is not None:
                    future.cancel() or future.result()  # none may still read the buffer
            self._store._finish(self._buffer, None)

    def _place(self, spec: TensorSpec, offset: int) -> torch.Tensor:
        return self._buffer.memory[offset : offset + spec.size_bytes].view(getattr(torch, spec.dtype)).view(spec.shape)

    def _copy_and_checksum(self, spec: TensorSpec, offset: int, tensor: torch.Tensor) -> int:
        """Chunk by chunk, so that what is hashed is still in the cache."""
        source = tensor.reshape(-1).view(torch.uint8).numpy()
        target = self._buffer.memory[offset : offset + spec.size_bytes].numpy()
        hasher = xxhash.xxh3_64()
        for start in range(0, len(source), CHUNK_BYTES):
            chunk = target[start : start + CHUNK_BYTES]
            np.copyto(chunk, source[start : start + CHUNK_BYTES])
            hasher.update(chunk.data)
        return hasher.intdigest()

    def _checksum(self, spec: TensorSpec, offset: int) -> int:
        return xxhash.xxh3_64_intdigest(_bytes(self._buffer.memory)[offset : offset + spec.size_bytes])


def _bytes(memory: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor in host memory."""
    return memory.numpy().data


def _allocate(total_bytes: int) -> torch.Tensor:
    return torch.empty(max(total_bytes, 1), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
