"""Where rows come from: blocks of rows behind one interface, read one block at a time.

Invariant: a source's blocks, their order and their rows never change while a job runs, so (file, row) names a row for
ever and a cursor means the same place after a restart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grpo_worker.data.options import DataOptions
from grpo_worker.data.reader import RawRow, RowGroup, RowGroupIndex, open_reader
from grpo_worker.data.schema import check_files
from grpo_worker.errors import DataError
from grpo_worker.functions import load_function

LARGE_ROW_GROUP_BYTES = 256 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file as the fingerprint of a checkpoint keeps it. A function has no size: 0."""

    name: str
    label: str
    size_bytes: int
    rows: int


class BlockReader(Protocol):
    """Reads one block at a time (`RowGroupReader` is one)."""

    def select(self, position: int) -> None: ...

    def rows(self, indices: Sequence[int]) -> list[RawRow]: ...


class RowSource(Protocol):
    """Rows in blocks."""

    files: tuple[SourceFile, ...]
    index: RowGroupIndex
    notes: tuple[str, ...]

    def open(self, *, needed_only: bool) -> AbstractContextManager[BlockReader]: ...

    def where(self, file: int, row: int) -> str: ...


class ParquetSource:
    """Row groups of Parquet files. The constructor checks every file and reads no row."""

    def __init__(self, files: Sequence[Path | str], options: DataOptions) -> None:
        self._schemas = check_files([Path(file) for file in files], options)
        self.index = RowGroupIndex.of(self._schemas)
        self.files = tuple(
            SourceFile(schema.path.name, schema.label, schema.size_bytes, schema.rows) for schema in self._schemas
        )
        self.notes = tuple(
            f"{schema.label}: a row group of {schema.path.name} takes {schema.largest_group_bytes >> 20} MiB, and one "
            "is held in memory. Write the file with smaller row groups to need less."
            for schema in self._schemas
            if schema.largest_group_bytes > LARGE_ROW_GROUP_BYTES
        )

    def open(self, *, needed_only: bool) -> AbstractContextManager[BlockReader]:
        return open_reader(self._schemas, self.index, needed_only=needed_only)

    def where(self, file: int, row: int) -> str:
        schema = self._schemas[file]
        return f"{schema.label}: {schema.path.name} row {row}"


class FunctionSource:
    """The dicts a user's function returns: one block, held in memory.

    The function must return the same rows in the same order each time: a job that resumes calls it again.
    """

    def __init__(self, spec: str, options: DataOptions, kwargs: Mapping[str, Any] | None = None) -> None:
        self._label = f"data.dataset: {spec}"
        self._rows = _call(load_function(spec, "data.dataset"), self._label, dict(kwargs or {}))
        self._keys = (options.prompt_key, options.response_key, options.reward_key)
        for row, values in enumerate(self._rows):
            for key, setting in ((options.prompt_key, "data.promptKey"), (options.reward_key, "data.rewardKey")):
                if key not in values:
                    names = ", ".join(str(name) for name in values)
                    raise DataError(f"{self.where(0, row)} has no {key!r} (keys: {names}). Add it, or set {setting}.")
        self.index = RowGroupIndex((RowGroup(0, 0, 0, len(self._rows)),))
        self.files: tuple[SourceFile, ...] = (SourceFile(spec, "data.dataset", 0, len(self._rows)),)
        self.notes: tuple[str, ...] = ()

    @contextmanager
    def open(self, *, needed_only: bool) -> Iterator[BlockReader]:
        yield self

    def select(self, position: int) -> None:
        """There is one block, always at hand."""

    def rows(self, indices: Sequence[int]) -> list[RawRow]:
        return [self._raw(self._rows[index]) for index in indices]

    def where(self, file: int, row: int) -> str:
        return f"{self._label} row {row}"

    def _raw(self, row: Mapping[str, Any]) -> RawRow:
        data = {key: value for key, value in row.items() if key not in self._keys}
        return RawRow(row[self._keys[0]], row[self._keys[2]], data)


def _call(function: Callable[..., Any], label: str, kwargs: dict[str, Any]) -> list[Mapping[str, Any]]:
    try:
        returned = function(**kwargs)
        if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping):
            raise DataError(f"{label} returned a {type(returned).__name__}. Return an iterable of dicts.")
        rows = list(returned)
    except DataError:
        raise
    except Exception as error:  # the function is the user's program
        raise DataError(f"{label} raised {type(error).__name__}: {error}.") from error
    if not rows:
        raise DataError(f"{label} returned no rows. Return at least one dict.")
    for row, values in enumerate(rows):
        if not isinstance(values, Mapping):
            raise DataError(f"{label} row {row} is a {type(values).__name__}, not a dict.")
    return rows
