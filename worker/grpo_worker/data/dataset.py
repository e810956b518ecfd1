"""Prompts in a fixed order, from any place on.

Invariants:
- `iterate(cursor)` yields exactly what an uninterrupted iteration yields from that cursor on, so a checkpoint needs
  two integers to resume the data. A changed data set is refused at restore, never silently continued.
- Whatever is wrong with any row is found by `scan()`, before a GPU does anything. It tokenises every prompt, so the number
  of steps in an epoch is exact, and keeps the tokens in the cache of `datasets`: a start with the same rows, tokenizer and
  limits finds them there.
- Memory is a few hundred prompts, and some bytes a row for the order; the rest is mapped from files.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from grpo_worker.data.columns import keys_of_rows
from grpo_worker.data.files import Rows
from grpo_worker.data.options import DataOptions
from grpo_worker.data.order import Cursor, Indices, epoch_order
from grpo_worker.data.tokenize import PromptEncoder
from grpo_worker.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features

STATE_VERSION = 2
# Of what the cache holds: to be raised with every change of what `_encode` makes of a row.
ENCODING_VERSION = 1
CHUNK_PROMPTS = 128


@dataclass(frozen=True)
class Prompt:
    """One prompt of one epoch. `uid` is unique over the run; `data` are the row's other columns, for the reward."""

    uid: str
    epoch: int
    position: int
    token_ids: list[int]
    text: str
    ground_truth: str
    data: dict[str, Any]
    file: int
    row: int

    @property
    def next_cursor(self) -> Cursor:
        """Where to go on after this prompt."""
        return Cursor(self.epoch, self.position + 1)


@dataclass(frozen=True)
class ScanReport:
    """What the pre-pass found. `rows = kept + dropped_overlong`; truncated rows are kept."""

    rows: int
    kept: int
    dropped_overlong: int
    truncated: int
    longest_prompt_tokens: int


class PromptDataset:
    """The prompts of some rows: tokenised once, then iterated from any cursor."""

    def __init__(self, rows: Sequence[Rows], options: DataOptions, encoder: PromptEncoder) -> None:
        """`rows`: of `open_files`, or a function's."""
        self.options = options
        self._rows = rows
        self._starts = np.cumsum([0, *map(len, rows)])
        self._encoder = encoder
        self._encoded: list[Dataset] = []
        self._kept = np.zeros(0, np.bool_)
        self._checksums: list[int] = []  # of each file's content
        self._kept_checksum = 0
        self._report: ScanReport | None = None

    def scan(self) -> ScanReport:
        """Read, check and tokenise every row, or find that done in the cache; later calls return the first one's report."""
        if self._report is not None:
            return self._report
        features, identity = _features(), f"{ENCODING_VERSION} {self._encoder.identity()}"
        encoded = [rows.encode(partial(self._encode, rows), features, identity) for rows in self._rows]
        tokens = np.concatenate([_column(part, "tokens") for part in encoded])
        kept = tokens > 0
        if not kept.any():
            raise DataError(
                f"{self.options.field}: all {len(kept)} prompts are over data.maxPromptLength = "
                f"{self._encoder.max_prompt_tokens} tokens. Raise it, or set data.filterOverlongPrompts: false and "
                "data.truncation to left, right or middle."
            )
        self._encoded, self._kept = encoded, kept
        self._kept_checksum = zlib.crc32(np.packbits(kept).tobytes())
        self._checksums = [zlib.crc32(_column(part, "checksum").tobytes()) for part in encoded]
        truncated = sum(int(_column(part, "truncated").sum()) for part in encoded)
        self._report = ScanReport(len(kept), int(kept.sum()), int((~kept).sum()), truncated, int(tokens.max()))
        return self._report

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in an epoch; the rest of an epoch that fills no batch is the caller's to drop."""
        report = self.scan()
        if batch_size > report.kept:
            dropped = ""
            if report.dropped_overlong:
                over = f"{report.dropped_overlong} of {report.rows} are over"
                dropped = f" ({over} data.maxPromptLength = {self._encoder.max_prompt_tokens} tokens)"
            raise DataError(
                f"data.trainBatchSize: {batch_size} prompts a step, but {self.options.field} has "
                f"{report.kept}{dropped}. Lower data.trainBatchSize to {report.kept} or less, or add data."
            )
        return report.kept // batch_size

    def iterate(self, cursor: Cursor | None = None) -> Iterator[Prompt]:
        """Prompts from the cursor on, over the ends of epochs, until `total_epochs` are done."""
        report = self.scan()
        at = cursor or Cursor()
        if at.epoch < 0 or not 0 <= at.position <= report.kept:
            raise DataError(
                f"{self.options.field}: the cursor (epoch {at.epoch}, position {at.position}) is outside an epoch of "
                f"{report.kept} prompts. Was the checkpoint made with other data?"
            )
        return self._iterate(at)

    def prompts_left(self, cursor: Cursor) -> int:
        """From the cursor on, over all epochs."""
        kept = self.scan().kept
        return max(0, (self.options.total_epochs - cursor.epoch) * kept - cursor.position)

    def state_dict(self, cursor: Cursor) -> dict[str, Any]:
        """The cursor and what the data was, as JSON values."""
        return {"version": STATE_VERSION, "cursor": asdict(cursor), "fingerprint": self.fingerprint()}

    def restore(self, state: Mapping[str, Any]) -> Cursor:
        """The cursor of a `state_dict`; DataError when this data set is not the one it was taken from."""
        try:
            version, saved = state["version"], state["fingerprint"]
            cursor = Cursor(int(state["cursor"]["epoch"]), int(state["cursor"]["position"]))
            if version != STATE_VERSION:
                raise DataError(
                    f"{self.options.field}: the checkpoint keeps its data state in version {version}, this program in "
                    f"{STATE_VERSION}. Resume with the program that saved it."
                )
            changes = _changes(saved, self.fingerprint())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self.options.field}: the checkpoint's data state cannot be read ({error!r}). Use another checkpoint."
            ) from error
        if changes:
            raise DataError(
                f"{self.options.field}: the data is not what the checkpoint was made with: {'; '.join(changes)}. "
                "Restore the data and its settings, or start a new run."
            )
        return cursor

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the order and the content of the prompts. The number of epochs may change; this may not."""
        report = self.scan()
        return {
            "files": [
                {"name": rows.name, "size_bytes": rows.size_bytes, "rows": len(rows), "content_crc32": checksum}
                for rows, checksum in zip(self._rows, self._checksums, strict=True)
            ],
            "seed": self.options.seed,
            "shuffle": self.options.shuffle,
            "kept": report.kept,
            "kept_crc32": self._kept_checksum,
            "max_prompt_tokens": self._encoder.max_prompt_tokens,
        }

    def _iterate(self, cursor: Cursor) -> Iterator[Prompt]:
        """A chunk is read while the one before is used: a disk may be slow, and who asks is the coordinator's event loop."""
        chunks = self._chunks(cursor)
        with ThreadPoolExecutor(1, "data") as thread:
            following = thread.submit(next, chunks, None)
            while (chunk := following.result()) is not None:
                following = thread.submit(next, chunks, None)
                yield from chunk

    def _chunks(self, cursor: Cursor) -> Iterator[list[Prompt]]:
        options = self.options
        for epoch in range(cursor.epoch, options.total_epochs):
            order = epoch_order(self._kept, seed=options.seed, epoch=epoch, shuffle=options.shuffle)
            for first in range(cursor.position if epoch == cursor.epoch else 0, len(order), CHUNK_PROMPTS):
                yield self._prompts(order[first : first + CHUNK_PROMPTS], epoch, first)

    def _prompts(self, order: Indices, epoch: int, position: int) -> list[Prompt]:
        found: list[Prompt | None] = [None] * len(order)
        files = np.searchsorted(self._starts, order, side="right") - 1
        for file in np.unique(files).tolist():
            places = np.flatnonzero(files == file)
            numbers = (order[places] - self._starts[file]).tolist()
            raw, encoded = self._rows[file].take(numbers), self._encoded[file][numbers]
            for i, (place, row) in enumerate(zip(places.tolist(), numbers, strict=True)):
                found[place] = Prompt(
                    uid=f"e{epoch}-f{file}-r{row}",
                    epoch=epoch,
                    position=position + place,
                    token_ids=encoded["token_ids"][i],
                    text=encoded["text"][i],
                    ground_truth=encoded["ground_truth"][i],
                    data=self._rows[file].keys.others_of(raw[i]),
                    file=file,
                    row=row,
                )
        return [prompt for prompt in found if prompt is not None]

    def _encode(self, rows: Rows, raw: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        """The columns of `_features` of some rows; a prompt over the limit has no tokens."""
        values = [self._values(rows, row, number) for row, number in zip(raw, numbers, strict=True)]
        prompts = self._encoder.encode_batch([prompt for prompt, _ in values], lambda i: rows.where(numbers[i]))
        truths = [ground_truth(reward, rows.where(n)) for (_, reward), n in zip(values, numbers, strict=True)]
        contents = [
            json.dumps([prompt, truth], default=str).encode() for (prompt, _), truth in zip(values, truths, strict=True)
        ]
        return {
            "token_ids": [prompt.token_ids if prompt else [] for prompt in prompts],
            "tokens": [len(prompt.token_ids) if prompt else 0 for prompt in prompts],
            "text": [prompt.text if prompt else "" for prompt in prompts],
            "truncated": [prompt is not None and prompt.truncated for prompt in prompts],
            "ground_truth": truths,
            "checksum": [zlib.crc32(content) for content in contents],
        }

    def _values(self, rows: Rows, row: Mapping[str, Any], number: int) -> tuple[Any, Any]:
        try:
            return rows.keys.prompt_of(row), rows.keys.reward_of(row)
        except (KeyError, TypeError) as error:  # of rows that are dictionaries, the first said what they have
            keys_of_rows(row, self.options, rows.where(number))
            raise DataError(f"{rows.where(number)} has another shape than row 0. Write all rows alike.") from error


def _features() -> "Features":
    from datasets import Features, List, Value

    return Features(
        {
            "token_ids": List(Value("int32")),
            "tokens": Value("int32"),
            "text": Value("large_string"),
            "truncated": Value("bool"),
            "ground_truth": Value("large_string"),
            "checksum": Value("uint32"),
        }
    )


def _column(data: "Dataset", name: str) -> npt.NDArray[Any]:
    return np.asarray(data.data.column(name).to_numpy())


def ground_truth(value: Any, where: str) -> str:
    """The ground truth as text: a number by its shortest digits, a whole one without a decimal point (42.0 of a column of floats is "42");
    truth values, lists and structs as JSON. Raises DataError."""
    value = _plain(value)
    if isinstance(value, str):
        return value
    if value is None or not isinstance(value, bool | int | float | Decimal | list | dict):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(
            f"{where}: the ground truth is {kind}, not text, a number, or a list or struct of those. Fill it in, or remove the row."
        )
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    if not math.isfinite(value):
        raise DataError(f"{where}: the ground truth is {value}. Fill it in, or remove the row.")
    return str(int(value)) if value == int(value) else str(value)


def _plain(value: Any) -> Any:
    """Without NumPy's types. Half and single precision keep their own digits: 0.1 stays 0.1."""
    if isinstance(value, np.float32 | np.float16):
        return float(str(value))
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words."""
    names = [[file["name"] for file in print_["files"]] for print_ in (saved, current)]
    if names[0] != names[1]:
        return [f"the files were {', '.join(names[0])} and are {', '.join(names[1])}"]
    changes = []
    for before, now in zip(saved["files"], current["files"], strict=True):
        differing = [key for key in ("rows", "size_bytes", "content_crc32") if before[key] != now[key]]
        if "rows" in differing:
            changes.append(f"{now['name']} had {before['rows']} rows and has {now['rows']}")
        elif "size_bytes" in differing:
            changes.append(f"{now['name']} had {before['size_bytes']} bytes and has {now['size_bytes']}")
        elif differing:
            changes.append(f"{now['name']} has other prompts or ground truths than before")
    for key, name in (("seed", "data.seed"), ("shuffle", "data.shuffle")):
        if saved[key] != current[key]:
            changes.append(f"{name} was {saved[key]} and is {current[key]}")
    if changes:
        return changes
    if saved["kept_crc32"] != current["kept_crc32"]:
        limits = [fingerprint.get("max_prompt_tokens") for fingerprint in (saved, current)]
        cause = "the chat template or the tokenizer changed"
        if limits[0] != limits[1]:
            cause = f"data.maxPromptLength was {limits[0]} and is {limits[1]}"
        return [
            f"other prompts than before are within the length limit, {saved['kept']} then and {current['kept']} now ({cause})"
        ]
    return []
