"""The rows that a document's names stand for: files, globs of files, data sets of the Hugging Face hub, a user's function.

Invariant: a name is looked at before it is read: what it is not is said in its own terms. What `datasets` has opened it reads from a copy of
its own in its cache (`HF_HOME`), mapped into memory: memory does not grow with the data, a file is converted once however often a job
starts, and one that changes meanwhile changes nothing until the next start.
"""

import csv
import difflib
import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from grpo_worker.data.columns import Keys, keys_of_rows, keys_of_table
from grpo_worker.data.options import DataOptions
from grpo_worker.errors import DataError, one_line
from grpo_worker.functions import load_function

if TYPE_CHECKING:
    from datasets import Dataset, Features

MAGIC = b"PAR1"
HUB = "hf://"
# Rows that are Python objects at one time: enough to tokenise in a batch, few enough not to count.
CHUNK_ROWS = 256

Encode = Callable[[Sequence[Mapping[str, Any]], Sequence[int]], dict[str, list[Any]]]  # rows, their numbers -> columns


class Rows(ABC):
    """The rows of one file, data set or function, which never change while a job runs, so that a number names a row for ever."""

    def __init__(self, name: str, label: str, keys: Keys, size_bytes: int = 0) -> None:
        """`label`: the field that named it, for messages; `size_bytes`: of the file, 0 for what is none."""
        self.name, self.label, self.keys, self.size_bytes = name, label, keys, size_bytes

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        """These rows, in this order, with all that they have."""

    @abstractmethod
    def encode(self, encode: Encode, features: "Features", identity: str) -> "Dataset":
        """What `encode` makes of every row, in their order; of the cache where the same was made before, as `identity` says."""

    def where(self, row: int) -> str:
        return f"{self.label}: {self.name} row {row}"


class TableRows(Rows):
    """Of a data set with columns."""

    def __init__(self, data: "Dataset", name: str, label: str, keys: Keys, size_bytes: int = 0) -> None:
        super().__init__(name, label, keys, size_bytes)
        self._data = data

    def __len__(self) -> int:
        return self._data.num_rows

    def take(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        return self._rows(self._data[list(rows)], rows)

    def encode(self, encode: Encode, features: "Features", identity: str) -> "Dataset":
        columns = self._needed()

        def batch(*arguments: Any) -> dict[str, list[Any]]:
            *values, numbers = arguments
            return encode(self._rows(dict(zip(columns, values, strict=True)), numbers), numbers)

        return self._data.map(
            batch,
            batched=True,
            batch_size=CHUNK_ROWS,
            with_indices=True,
            input_columns=columns,
            remove_columns=self._data.column_names,
            features=features,
            new_fingerprint=xxhash.xxh3_128_hexdigest(f"{self._data._fingerprint} {self.keys} {identity}".encode()),
        )

    def _needed(self) -> list[str]:
        return list(dict.fromkeys((self.keys.prompt[0], self.keys.reward[0])))

    def _rows(self, columns: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class LineRows(TableRows):
    """Of a file with a JSON object a line, each read by itself: a column's type would be guessed from the first ones, and "007" become 7."""

    def _needed(self) -> list[str]:
        return ["text"]

    def _rows(self, columns: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        return [json_row(line, self.where(number)) for line, number in zip(columns["text"], numbers, strict=True)]


class FunctionRows(Rows):
    """The dicts that a user's `module:function` returns, held in memory. It must return the same ones when a job resumes."""

    def __init__(self, spec: str, options: DataOptions, kwargs: Mapping[str, Any] | None = None) -> None:
        """Raises DataError for a function that cannot be used or rows that lack a key."""
        self._rows = _call(load_function(spec, "data.dataset"), f"data.dataset: {spec}", dict(kwargs or {}))
        super().__init__(spec, "data.dataset", keys_of_rows(self._rows[0], options, f"data.dataset: {spec} row 0"))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self._rows[row] for row in rows]

    def encode(self, encode: Encode, features: "Features", identity: str) -> "Dataset":
        from datasets import Dataset

        return Dataset.from_dict(encode(self._rows, range(len(self))), features=features)


def open_files(names: Sequence[Path | str], options: DataOptions) -> list[Rows]:
    """The rows of each file, in order. Raises DataError with every problem found, a line each, before anything is converted."""
    if not names:
        raise DataError(f"{options.field}: no files are given. Name at least one.")
    found: list[Callable[[], Rows]] = []
    problems: list[str] = []
    for position, name in enumerate(names):
        try:
            found += _find(str(name), options, f"{options.field}[{position}]")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return [opened() for opened in found]


def _find(name: str, options: DataOptions, label: str) -> list[Callable[[], Rows]]:
    """Of each file that the name stands for, what opens it; whatever can be checked first is."""
    if name.startswith(HUB):
        return [lambda: _hub(name, options, label)]
    path = Path(name)
    paths = [path]
    if not path.exists() and glob.has_magic(name):
        paths = [Path(each) for each in sorted(glob.glob(name, recursive=True)) if Path(each).is_file()]
        if not paths:
            raise DataError(
                f"{label}: no file is called {name}. Check the pattern, or mount the volume that holds them."
            )
    return [_file(each, options, label) for each in paths]


def _file(path: Path, options: DataOptions, label: str) -> Callable[[], Rows]:
    head, tail, size = _ends(path, label)
    suffix = path.suffix.lower()
    if head.startswith(MAGIC):
        return _parquet(path, options, label, tail, size)
    if not head.startswith((b"version https://git-lfs", b"\x1f\x8b")):
        if suffix in (".jsonl", ".ndjson", ".json"):
            return _json_lines(path, options, label, size)
        if suffix in (".csv", ".tsv"):
            return _csv(path, options, label, size, "," if suffix == ".csv" else "\t")
    raise DataError(f"{label}: {path.name} is not a Parquet file{_guess_format(head)}")


def _parquet(path: Path, options: DataOptions, label: str, tail: bytes, size: int) -> Callable[[], Rows]:
    if tail != MAGIC or size < 3 * len(MAGIC):
        raise DataError(f"{label}: {path.name} is cut off: it has no Parquet footer. Copy or write it again.")
    try:
        with pq.ParquetFile(path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{label}: {path} cannot be read as Parquet ({one_line(error)}). Write it again.") from error
    if rows == 0:
        raise DataError(f"{label}: {path.name} is empty (0 rows). Remove it from the list, or write it again.")
    keys = keys_of_table(schema, options, label, path.name)
    return lambda: TableRows(_load("parquet", path, label), path.name, label, keys, size)


def _json_lines(path: Path, options: DataOptions, label: str, size: int) -> Callable[[], Rows]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    if first.lstrip().startswith("["):
        raise DataError(f"{label}: {path.name} is one JSON array. Write an object a line (JSON Lines), or Parquet.")
    where = f"{label}: {path.name} row 0"
    keys = keys_of_rows(json_row(first, where), options, where)
    return lambda: LineRows(_load("text", path, label, encoding="utf-8-sig"), path.name, label, keys, size)


def _csv(path: Path, options: DataOptions, label: str, size: int, separator: str) -> Callable[[], Rows]:
    from datasets import Features, Value

    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = csv.reader(file, delimiter=separator)
        header, first = next(lines, []), next(lines, None)
    if first is None:
        raise DataError(f"{label}: {path.name} is empty (0 rows). Remove it from the list, or write it again.")
    if len(first) != len(header):  # pandas would take the surplus for an index, and every cell for its neighbour's
        raise DataError(
            f"{label}: {path.name} has {len(header)} names in its first line and {len(first)} cells in its second."
        )
    keys = keys_of_table(pa.schema([(name, pa.string()) for name in header]), options, label, path.name)
    text = Features({name: Value("string") for name in header})  # as it is written: 007 is no number, NA no null
    return lambda: TableRows(
        _load("csv", path, label, sep=separator, features=text, keep_default_na=False, encoding="utf-8-sig"),
        path.name, label, keys, size,
    )  # fmt: skip


def _hub(name: str, options: DataOptions, label: str) -> Rows:
    """`hf://OWNER/NAME[:CONFIGURATION[:SPLIT]]`; the split is train unless it is named."""
    repository, _, rest = name.removeprefix(HUB).partition(":")
    configuration, _, split = rest.partition(":")
    try:
        data = _library().load_dataset(repository, configuration or None, split=split or "train")
    except Exception as error:  # of the hub, the network, the repository's own files
        raise DataError(
            f"{label}: {name} cannot be loaded from the Hugging Face hub ({type(error).__name__}: {one_line(error)}). Check its name, "
            "configuration and split (hf://OWNER/NAME:CONFIGURATION:SPLIT) and HF_TOKEN, or name files that are here."
        ) from error
    if data.num_rows == 0:
        raise DataError(f"{label}: {name} is empty (0 rows). Name another split.")
    return TableRows(data, name, label, keys_of_table(data.features.arrow_schema, options, label, name))


def _load(kind: str, path: Path, label: str, **options: Any) -> "Dataset":
    status = path.stat()
    # The library knows a file by its path and time; by its size too, one that was written within a clock's tick is another.
    name, files = f"{status.st_size}-{status.st_mtime_ns}", {"train": [glob.escape(str(path.resolve()))]}
    try:
        if kind == "parquet":
            builder = _parquet_builder(_library())(config_name=name, data_files=files)
            builder.download_and_prepare()
            return builder.as_dataset("train")
        return _library().load_dataset(kind, name, data_files=files, split="train", **options)
    except Exception as error:  # its own kinds, Arrow's, pandas'
        cause = error.__cause__ or error
        raise DataError(
            f"{label}: {path} cannot be read ({type(cause).__name__}: {one_line(cause)}). Copy or write the file again."
        ) from error


def _library() -> Any:
    """`datasets`, which takes two seconds to import, without its bars on stderr."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _parquet_builder(datasets: Any) -> Any:
    """As `datasets` reads Parquet, but not a whole row group at a time, which may be more than the memory, and more text than one Arrow array
    can hold."""

    class ParquetRows(datasets.ArrowBasedBuilder):
        def _info(self) -> Any:
            return datasets.DatasetInfo()

        def _split_generators(self, _: Any) -> list[Any]:
            return [datasets.SplitGenerator("train", {"path": self.config.data_files["train"][0]})]

        def _generate_tables(self, path: str) -> Iterator[tuple[int, pa.Table]]:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                for number, batch in enumerate(file.iter_batches(CHUNK_ROWS, use_threads=False)):
                    yield number, pa.Table.from_batches([batch])

    return ParquetRows


def json_row(line: str, where: str) -> dict[str, Any]:
    """Raises DataError for what is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}). Write one object a line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object. Write one object a line.")
    return row


def _ends(path: Path, label: str) -> tuple[bytes, bytes, int]:
    """First and last bytes, and the size, of a file that can be read."""
    try:
        if path.is_dir():
            names = sorted(entry.name for entry in path.glob("*.parquet"))[:3]
            inside = f" such as {path / names[0]}, or {path / '*.parquet'}" if names else ""
            raise DataError(f"{label}: {path} is a directory. Name its files{inside}.")
        with path.open("rb") as file:
            head = file.read(64)
            size = file.seek(0, 2)
            file.seek(max(0, size - len(MAGIC)))
            tail = file.read()
    except FileNotFoundError as error:
        raise DataError(f"{label}: {path} does not exist.{_near_files(path)}") from error
    except OSError as error:
        raise DataError(f"{label}: {path} cannot be read ({error.strerror}). Check its owner and mode.") from error
    if size == 0:
        raise DataError(f"{label}: {path.name} is empty (0 bytes). Write it again.")
    return head, tail, size


def _near_files(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" Nor does its directory {parent}. Check the path, or mount the volume that holds it."
    names = [entry.name for entry in parent.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f" Did you mean {parent / near[0]}?"
    parquet = sorted(name for name in names if name.endswith(".parquet"))
    return f" Parquet files there: {', '.join(parquet[:5])}." if parquet else f" {parent} holds no Parquet file."


def _guess_format(head: bytes) -> str:
    if head.lstrip()[:1] in (b"{", b"["):
        return ": it looks like JSON. Write an object a line and call it NAME.jsonl."
    if head.startswith(b"version https://git-lfs"):
        return ": it is a Git LFS pointer, not the data. Run `git lfs pull`."
    if head.startswith(b"\x1f\x8b"):
        return ": it is gzip. Unpack it first."
    if head.startswith(b"ARROW1"):
        return ": it is Arrow IPC (Feather). Write it as Parquet."
    if head.startswith(b"PARE"):
        return " that can be read without a key: its footer is encrypted. Write it without encryption."
    return f" (it starts with {head[:4]!r}, not {MAGIC!r}), nor called .jsonl or .csv. Write it as Parquet."


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
