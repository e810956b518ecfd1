"""How DCP reads and writes the files of `state/`.

Invariants: a file is hashed by the one rank that it belongs to, while that rank reads it for its own tensors, so a load reads each byte
once; damage on any rank fails the load on all of them. A write that fails says why.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from grpo_worker.checkpoint.files import HashingReader
from grpo_worker.checkpoint.layout import STATE_DIRECTORY
from grpo_worker.checkpoint.manifest import FileEntry, content_changed, file_problem
from grpo_worker.errors import CheckpointDamagedError
from grpo_worker.trainer.distributed import Ranks

METADATA_FILE = ".metadata"
_SHARD = re.compile(r"__(\d+)_\d+\.distcp")


class ShardWriter(dcp.FileSystemWriter):
    """Tells why a write failed: on its way between ranks an exception loses what it was raised from."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as exception:
            if system := system_error(exception):
                raise OSError(system.errno, system.strerror, str(self.path)) from exception
            raise


class ShardReader(dcp.FileSystemReader):
    """Reads `directory/state` of a checkpoint whose manifest lists `files`."""

    def __init__(self, directory: Path, files: Mapping[str, FileEntry], ranks: Ranks) -> None:
        super().__init__(directory / STATE_DIRECTORY)
        self._directory = directory
        self._files = files
        shards = {name: shard for name in files if (shard := _SHARD.fullmatch(Path(name).name))}
        # The rank that wrote a file reads nearly all of it; when there are fewer ranks now, some get several.
        mine = [name for name, shard in shards.items() if int(shard[1]) % ranks.world_size == ranks.rank]
        self._unread = set(mine)
        self._checked = {*mine, *(name for name in files if name not in shards)}
        self.fs = _CheckedFiles(self)

    def whole(self, name: str) -> io.BytesIO:
        """A small file of `state/`, checked. Raises CheckpointDamagedError, OSError."""
        with self.fs.create_stream(self._directory / STATE_DIRECTORY / name, "rb") as stream:
            return io.BytesIO(stream.read(-1))

    def read_data(self, plan: Any, planner: Any) -> Any:
        in_order = sorted(plan.items, key=lambda item: self._place(item.storage_index))
        done = super().read_data(replace(plan, items=in_order), planner)
        for name in sorted(self._unread):  # tensors that this model does not have, or that other ranks took
            if problem := file_problem(self._directory, name, self._files[name]):
                raise CheckpointDamagedError(problem)
        return done

    def _place(self, index: Any) -> tuple[str, int]:
        place = self.storage_data[index]
        return place.relative_path, place.offset

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """In one piece: torch.load begins at the end of what it is given."""
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))

    @contextmanager
    def checking(self, path: Path, stream: Any) -> Iterator[Any]:
        """`stream`, hashed when it is this rank's to check. Raises CheckpointDamagedError when it is over."""
        name = path.relative_to(self._directory).as_posix()
        if name not in self._checked:
            yield stream
            return
        self._unread.discard(name)
        hashing = HashingReader(stream)
        try:
            yield hashing
        finally:  # what cannot be unpickled has changed as well, and this says so
            if hashing.checksum() != self._files[name].checksum:
                raise CheckpointDamagedError(content_changed(name, self._files[name]))


class _CheckedFiles(FileSystem):
    """What DCP opens files with."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream, self._reader.checking(Path(path), stream) as checked:
            yield cast(Any, checked)


def system_error(exception: BaseException | None) -> OSError | None:
    """The system's error beneath an exception; PyTorch's file writer covers it with one of its own."""
    seen: set[int] = set()
    while exception is not None and id(exception) not in seen:
        seen.add(id(exception))
        failures = getattr(exception, "failures", None)
        wrapped = next(iter(failures.values()), None) if isinstance(failures, dict) else None
        inner = wrapped[0] if isinstance(wrapped, tuple) else None
        if isinstance(inner, BaseException) and (found := system_error(inner)):
            return found
        if isinstance(exception, OSError):
            return exception
        exception = exception.__cause__ or exception.__context__
    return None
