"""Parquet files as the loader likes them.

Invariant: a file under its final name is complete. Rows are shuffled as a whole by seed and written in small row
groups, so the loader's shuffle by block mixes all of the data and its memory stays small. An existing file is kept
unless overwriting it is asked for.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_worker.data.order import file_order
from grpo_worker.errors import ConfigError, UsageError
from grpo_worker.storage import whole_file

ROW_GROUP_ROWS = 1024


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Called before the work as well as before the write."""
    if output.is_dir():
        raise UsageError(f"{output} is a directory. Name a file in it, such as {output / 'train.parquet'}.")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists. Choose another name, or allow overwriting it.")


def write_shuffled(
    table: pa.Table, output: Path, *, seed: int, row_group_rows: int = ROW_GROUP_ROWS, overwrite: bool = False
) -> None:
    """Write the rows in the order that `seed` gives, under a temporary name that is then renamed."""
    refuse_existing(output, overwrite)
    if row_group_rows < 1:
        raise UsageError(f"{row_group_rows} rows a row group: use 1 or more.")
    if seed < 0:
        raise UsageError(f"seed {seed} is negative. Use 0 or more.")
    shuffled = table.take(pa.array(file_order(table.num_rows, seed)))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as temporary:
            pq.write_table(shuffled, temporary, row_group_size=row_group_rows, compression="zstd")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}. Choose another place.") from error
