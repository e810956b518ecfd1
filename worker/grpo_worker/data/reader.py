"""Row groups, streamed.

Invariant: a reader holds at most one decoded row group of one file. The decoded table never leaves the reader, and it
is released before the next one is read, so the memory of a data set of any size is that of its largest row group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_worker.data.schema import FileSchema
from grpo_worker.errors import DataError


@dataclass(frozen=True)
class RowGroup:
    """One row group; `first_row` is the 0-based row of its file that it starts with."""

    file: int
    group: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class RowGroupIndex:
    """All row groups of all files, in file order: files x row groups x rows."""

    groups: tuple[RowGroup, ...]

    @classmethod
    def of(cls, schemas: Sequence[FileSchema]) -> "RowGroupIndex":
        groups: list[RowGroup] = []
        for file, schema in enumerate(schemas):
            first_row = 0
            for group, rows in enumerate(schema.row_group_rows):
                # Writers may leave empty row groups behind; they hold nothing to iterate.
                if rows:
                    groups.append(RowGroup(file, group, first_row, rows))
                first_row += rows
        return cls(tuple(groups))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, position: int) -> RowGroup:
        return self.groups[position]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)


class RawRow(NamedTuple):
    """One row as it was written: the two values that the loader needs, and every other column."""

    prompt: Any
    reward: Any
    data: dict[str, Any]


class RowGroupReader:
    """Reads the row groups of checked files, one at a time.

    `needed_only` reads the prompt and the ground truth and leaves the other columns on the disk.
    """

    def __init__(self, schemas: Sequence[FileSchema], index: RowGroupIndex, *, needed_only: bool = False) -> None:
        self._schemas = schemas
        self._index = index
        self._needed_only = needed_only
        self._open_file: int | None = None
        self._parquet: pq.ParquetFile | None = None
        self._table: pa.Table | None = None
        self._columns = schemas[0].columns

    def select(self, position: int) -> None:
        """Decode the row group at `position` of the index; the one before is released first."""
        self._table = None
        group = self._index[position]
        schema = self._schemas[group.file]
        names = [schema.columns.prompt.name, schema.columns.reward.name] if self._needed_only else None
        try:
            parquet = self._parquet_of(group.file)
            self._table = parquet.read_row_group(group.group, columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{schema.label}: row group {group.group} of {schema.path} cannot be read ({error}). "
                "Copy or write the file again."
            ) from error
        self._columns = schema.columns

    def rows(self, indices: Sequence[int]) -> list[RawRow]:
        """The rows at these places of the selected row group, in this order."""
        if self._table is None:
            raise ValueError("select a row group first")
        return [self._raw(row) for row in self._table.take(pa.array(indices, pa.int64())).to_pylist()]

    def close(self) -> None:
        """Release the decoded row group and the file."""
        self._table = None
        if self._parquet is not None:
            self._parquet.close()
        self._parquet = self._open_file = None

    def _raw(self, row: dict[str, Any]) -> RawRow:
        columns = self._columns
        prompt, reward = columns.prompt.value(row), columns.reward.value(row)
        # A struct such as verl's reward_model stays in `data`: its other fields are the reward function's business.
        for column in (columns.prompt, columns.reward, columns.response):
            if column is not None and not column.path:
                row.pop(column.name, None)
        return RawRow(prompt, reward, row)

    def _parquet_of(self, file: int) -> pq.ParquetFile:
        if self._parquet is not None and self._open_file == file:
            return self._parquet
        self.close()
        schema = self._schemas[file]
        stat = schema.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (schema.size_bytes, schema.modified_ns):
            raise DataError(
                f"{schema.label}: {schema.path} changed while the job was using it. "
                "Restore the file, or start the job again."
            )
        # pre_buffer would hold the encoded row group beside the decoded one.
        self._parquet = pq.ParquetFile(schema.path, pre_buffer=False)
        self._open_file = file
        return self._parquet


@contextmanager
def open_reader(
    schemas: Sequence[FileSchema], index: RowGroupIndex, *, needed_only: bool = False
) -> Iterator[RowGroupReader]:
    """A reader that is closed at the end of the block."""
    reader = RowGroupReader(schemas, index, needed_only=needed_only)
    try:
        yield reader
    finally:
        reader.close()
