"""What a data file must look like, checked from its footer before a row is read.

Invariant: a `FileSchema` exists only for a readable Parquet file with at least one row, whose prompt is text or a list
of `{role, content}` messages and whose ground truth is text or a number. Everything wrong with any of the files is
reported at once, each line naming the file and what to do.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_worker.data.options import DataOptions
from grpo_worker.errors import DataError, one_line

MAGIC = b"PAR1"

# Names under which other data sets and trainers keep the same thing.
KNOWN_ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "problem", "query", "instruction", "input", "messages"),
    "response": ("completion", "output"),
    "reward": ("ground_truth", "answer", "solution", "label", "target"),
}


class Kind(StrEnum):
    """What a column holds, as far as the loader cares."""

    TEXT = "text"
    MESSAGES = "messages"
    NUMBER = "number"


@dataclass(frozen=True)
class Column:
    """One needed value of a row: the Parquet column, and the path of struct fields below it."""

    name: str
    path: tuple[str, ...]
    kind: Kind

    def value(self, row: Mapping[str, Any]) -> Any:
        """The value in a decoded row; None where a struct on the way is null."""
        value = row[self.name]
        for part in self.path:
            if value is None:
                return None
            value = value[part]
        return value


@dataclass(frozen=True)
class Columns:
    """The columns of one file by their role. Files made for training elsewhere often have no response column."""

    prompt: Column
    reward: Column
    response: Column | None


@dataclass(frozen=True)
class FileSchema:
    """A checked file: its shape from the footer, no data."""

    path: Path
    label: str
    size_bytes: int
    modified_ns: int
    row_group_rows: tuple[int, ...]
    largest_group_bytes: int
    columns: Columns

    @property
    def rows(self) -> int:
        return sum(self.row_group_rows)


def check_files(files: Sequence[Path], options: DataOptions) -> tuple[FileSchema, ...]:
    """The schemas of all files, or one DataError with every problem found, a line each."""
    if not files:
        raise DataError(f"{options.field}: no files are given. Name at least one Parquet file.")
    schemas: list[FileSchema] = []
    problems: list[str] = []
    for position, path in enumerate(files):
        try:
            schemas.append(check_file(path, options, f"{options.field}[{position}]"))
        except DataError as error:
            problems.append(str(error))
    problems += _mixed_kinds(schemas, options)
    if problems:
        raise DataError("\n".join(problems))
    return tuple(schemas)


def check_file(path: Path, options: DataOptions, label: str) -> FileSchema:
    """Check one file; `label` is the field that names it, such as `data.trainFiles[0]`."""
    size_bytes, modified_ns = check_is_parquet(path, label)
    try:
        with pq.ParquetFile(path) as file:
            metadata, arrow_schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{label}: {path} cannot be read as Parquet ({one_line(error)}). Write it again.") from error
    if metadata.num_rows == 0:
        raise DataError(f"{label}: {path.name} is empty (0 rows). Remove it from the list, or write it again.")
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return FileSchema(
        path=path,
        label=label,
        size_bytes=size_bytes,
        modified_ns=modified_ns,
        row_group_rows=tuple(group.num_rows for group in groups),
        largest_group_bytes=max(group.total_byte_size for group in groups),
        columns=_check_columns(path, arrow_schema, options, label),
    )


def check_is_parquet(path: Path, label: str) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of a file that starts and ends as Parquet does."""
    try:
        if path.is_dir():
            names = sorted(entry.name for entry in path.glob("*.parquet"))[:3]
            inside = f" such as {path / names[0]}" if names else ""
            raise DataError(f"{label}: {path} is a directory. Name its Parquet files{inside}.")
        with path.open("rb") as file:
            head = file.read(64)
            size_bytes = file.seek(0, 2)
            file.seek(max(0, size_bytes - len(MAGIC)))
            tail = file.read()
            modified_ns = path.stat().st_mtime_ns
    except FileNotFoundError as error:
        raise DataError(f"{label}: {path} does not exist.{_near_files(path)}") from error
    except OSError as error:
        raise DataError(f"{label}: {path} cannot be read ({error.strerror}). Check its owner and mode.") from error
    if size_bytes == 0:
        raise DataError(f"{label}: {path.name} is empty (0 bytes). Write it again.")
    if not head.startswith(MAGIC):
        raise DataError(f"{label}: {path.name} is not a Parquet file{_guess_format(head)}")
    if tail != MAGIC or size_bytes < 3 * len(MAGIC):
        raise DataError(f"{label}: {path.name} is cut off: it has no Parquet footer. Copy or write it again.")
    return size_bytes, modified_ns


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
        return ": it looks like JSON. Convert it (GSM8K: `grpo data gsm8k`)."
    if head.startswith(b"version https://git-lfs"):
        return ": it is a Git LFS pointer, not the data. Run `git lfs pull`."
    if head.startswith(b"\x1f\x8b"):
        return ": it is gzip. Unpack it first."
    if head.startswith(b"ARROW1"):
        return ": it is Arrow IPC (Feather). Write it as Parquet."
    if head.startswith(b"PARE"):
        return " that can be read without a key: its footer is encrypted. Write it without encryption."
    return f" (it starts with {head[:4]!r}, not {MAGIC!r}). Write it as Parquet."


def _check_columns(path: Path, schema: pa.Schema, options: DataOptions, label: str) -> Columns:
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise DataError(f"{label}: {path.name} has two columns named {twice[0]!r}. Rename or drop one.")
    problems: list[str] = []

    def column(role: str, key: str, kinds: tuple[Kind, ...]) -> Column | None:
        found = _resolve(schema, key)
        if found is None:
            problems.append(_missing(path, schema, role, key, label))
            return None
        name, fields, arrow_type = found
        kind = _kind_of(arrow_type)
        if kind is None or kind not in kinds:
            problems.append(
                f"{label}: column {key!r} of {path.name} has type {arrow_type}, not {_either(kinds)}. "
                f"Write it as {kinds[0]}, or set data.{role}Key to another column."
            )
            return None
        return Column(name, fields, kind)

    prompt = column("prompt", options.prompt_key, (Kind.TEXT, Kind.MESSAGES))
    reward = column("reward", options.reward_key, (Kind.TEXT, Kind.NUMBER))
    response = None
    if _response_is_expected(schema, options):
        response = column("response", options.response_key, (Kind.TEXT,))
    if problems or prompt is None or reward is None:
        raise DataError("\n".join(problems))
    return Columns(prompt, reward, response)


def _response_is_expected(schema: pa.Schema, options: DataOptions) -> bool:
    """Training needs no response, so its column may be absent, unless it was asked for or only its case is wrong."""
    key = options.response_key
    return key != DataOptions.response_key or any(name.lower() == key.lower() for name in schema.names)


def _resolve(schema: pa.Schema, key: str) -> tuple[str, tuple[str, ...], pa.DataType] | None:
    """Column name, struct fields below it, and type; a column whose own name has dots comes first."""
    if key in schema.names:
        return key, (), schema.field(key).type
    name, *fields = key.split(".")
    if not fields or name not in schema.names:
        return None
    arrow_type = schema.field(name).type
    for field in fields:
        if not pa.types.is_struct(arrow_type) or arrow_type.get_field_index(field) < 0:
            return None
        arrow_type = arrow_type.field(field).type
    return name, tuple(fields), arrow_type


def _missing(path: Path, schema: pa.Schema, role: str, key: str, label: str) -> str:
    names = list(schema.names)
    head = f"{label}: {path.name} has no column {key!r} (columns: {', '.join(names)})."
    setting = f"data.{role}Key"
    wrong_case = [name for name in names if name.lower() == key.lower()]
    if wrong_case:
        return f"{head} {wrong_case[0]!r} differs only in case: rename it, or set {setting}: {wrong_case[0]}."
    if role == "reward" and _resolve(schema, "reward_model.ground_truth"):
        return f"{head} verl keeps it in a struct: set {setting}: reward_model.ground_truth."
    if {"question", "answer"} <= set(names) and role in ("prompt", "reward"):
        return f"{head} It looks like raw GSM8K: convert it with `grpo data gsm8k`, or set {setting}."
    near = difflib.get_close_matches(key, names, n=1) or [name for name in names if name in KNOWN_ALIASES[role]]
    if near:
        return f"{head} Is it {near[0]!r}? Rename it, or set {setting}: {near[0]}."
    return f"{head} Rename it, or set {setting}."


def _kind_of(arrow_type: pa.DataType) -> Kind | None:
    types = pa.types
    if types.is_dictionary(arrow_type):
        return _kind_of(arrow_type.value_type)
    if types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type):
        return Kind.TEXT
    if types.is_integer(arrow_type) or types.is_floating(arrow_type) or types.is_decimal(arrow_type):
        return Kind.NUMBER
    if types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        message = arrow_type.value_type
        if types.is_struct(message) and all(_is_text_field(message, name) for name in ("role", "content")):
            return Kind.MESSAGES
    return None


def _is_text_field(struct: pa.StructType, name: str) -> bool:
    return struct.get_field_index(name) >= 0 and _kind_of(struct.field(name).type) is Kind.TEXT


def _mixed_kinds(schemas: Sequence[FileSchema], options: DataOptions) -> list[str]:
    """A role must be of one kind in all files: a mixed one is nearly always a file of another data set."""
    problems = []
    for key, kinds in (
        (options.prompt_key, [schema.columns.prompt.kind for schema in schemas]),
        (options.reward_key, [schema.columns.reward.kind for schema in schemas]),
    ):
        for schema, kind in zip(schemas, kinds, strict=True):
            if kind != kinds[0]:
                problems.append(
                    f"{schema.label}: column {key!r} of {schema.path.name} is {kind}, but {kinds[0]} in "
                    f"{schemas[0].path.name} ({schemas[0].label}). Write both alike."
                )
    return problems


def _either(kinds: tuple[Kind, ...]) -> str:
    words = {Kind.TEXT: "text", Kind.MESSAGES: "a list of {role, content} messages", Kind.NUMBER: "a number"}
    return " or ".join(words[kind] for kind in kinds)
