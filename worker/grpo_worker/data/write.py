"""Parquet files of a converter.

Invariant: a file under its final name is complete, and its rows are in the order that the seed gives. An existing file is kept unless
overwriting it is asked for.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_worker.data.order import file_order
from grpo_worker.errors import ConfigError, UsageError
from grpo_worker.storage import whole_file


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Called before the work as well as before the write."""
    if output.is_dir():
        raise UsageError(f"{output} is a directory. Name a file in it, such as {output / 'train.parquet'}.")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists. Choose another name, or allow overwriting it.")


def write_shuffled(table: pa.Table, output: Path, *, seed: int, overwrite: bool = False) -> None:
    """Write the rows in the order that `seed` gives, under a temporary name that is then renamed."""
    refuse_existing(output, overwrite)
    if seed < 0:
        raise UsageError(f"seed {seed} is negative. Use 0 or more.")
    shuffled = table.take(pa.array(file_order(table.num_rows, seed)))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as temporary:
            pq.write_table(shuffled, temporary, compression="zstd")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}. Choose another place.") from error
