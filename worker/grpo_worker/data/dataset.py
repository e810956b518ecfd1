"""Prompts in a fixed order, from any place on.

Invariants:
- `iterate(cursor)` yields exactly what an uninterrupted iteration yields from that cursor on, so a checkpoint needs
  two integers to resume the data. A changed data set is refused at restore, never silently continued.
- Whatever is wrong with any row is found by `scan()`, before a GPU does anything. It tokenises every prompt and keeps
  one bit a row, so the number of steps in an epoch is exact.
- Memory is one decoded row group, a few hundred prompts, and the bits.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from grpo_worker.data.options import DataOptions
from grpo_worker.data.order import Cursor, KeptRows, epoch_order
from grpo_worker.data.reader import RawRow
from grpo_worker.data.source import FunctionSource, ParquetSource, RowSource
from grpo_worker.data.tokenize import EncodedPrompt, PromptEncoder
from grpo_worker.errors import DataError

STATE_VERSION = 1
# Rows that are Python objects at one time: enough to tokenise in a batch, few enough not to count.
CHUNK_ROWS = 256


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
    notes: tuple[str, ...]


class BlockDataset:
    """Prompts of a row source: scanned once, then iterated from any cursor."""

    def __init__(self, source: RowSource, options: DataOptions, encoder: PromptEncoder) -> None:
        self.options = options
        self._source = source
        self._encoder = encoder
        self._kept: list[KeptRows] = []
        self._checksums: list[int] = []
        self._report: ScanReport | None = None

    def scan(self) -> ScanReport:
        """Read, check and tokenise every row once; later calls return the first one's report."""
        if self._report is not None:
            return self._report
        kept: list[KeptRows] = []
        checksums = [0] * len(self._source.files)
        truncated = longest = 0
        with self._source.open(needed_only=True) as reader:
            for position, group in enumerate(self._source.index.groups):
                reader.select(position)
                mask = np.zeros(group.rows, dtype=np.bool_)
                for start in range(0, group.rows, CHUNK_ROWS):
                    chunk = range(start, min(start + CHUNK_ROWS, group.rows))
                    raw = reader.rows(chunk)
                    first_row = group.first_row + start
                    encoded = self._encode(raw, group.file, range(first_row, first_row + len(raw)))
                    for offset, (row, prompt) in enumerate(zip(raw, encoded, strict=True)):
                        truth = ground_truth(row.reward, self._source.where(group.file, first_row + offset))
                        content = json.dumps([row.prompt, truth], default=str).encode()
                        checksums[group.file] = zlib.crc32(content, checksums[group.file])
                        if prompt is not None:
                            mask[start + offset] = True
                            truncated += prompt.truncated
                            longest = max(longest, len(prompt.token_ids))
                kept.append(KeptRows(mask))
        rows, kept_rows = self._source.index.rows, sum(block.count for block in kept)
        if kept_rows == 0:
            raise DataError(
                f"{self.options.field}: all {rows} prompts are over data.maxPromptLength = "
                f"{self._encoder.max_prompt_tokens} tokens. Raise it, or set data.filterOverlongPrompts: false and "
                "data.truncation to left, right or middle."
            )
        self._kept, self._checksums = kept, checksums
        self._report = ScanReport(rows, kept_rows, rows - kept_rows, truncated, longest, self._source.notes)
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
        kept_crc32 = 0
        for block in self._kept:
            kept_crc32 = zlib.crc32(block.tobytes(), kept_crc32)
        return {
            "files": [
                {"name": file.name, "size_bytes": file.size_bytes, "rows": file.rows, "content_crc32": checksum}
                for file, checksum in zip(self._source.files, self._checksums, strict=True)
            ],
            "row_groups": len(self._source.index),
            "seed": self.options.seed,
            "shuffle": self.options.shuffle,
            "kept": report.kept,
            "kept_crc32": kept_crc32,
            "max_prompt_tokens": self._encoder.max_prompt_tokens,
        }

    def _iterate(self, cursor: Cursor) -> Iterator[Prompt]:
        options, groups = self.options, self._source.index
        with self._source.open(needed_only=False) as reader:
            for epoch in range(cursor.epoch, options.total_epochs):
                start = cursor if epoch == cursor.epoch else Cursor(epoch)
                blocks = epoch_order(self._kept, start, seed=options.seed, shuffle=options.shuffle)
                for block, position, order in blocks:
                    reader.select(block)
                    for first in range(0, len(order), CHUNK_ROWS):
                        indices = order[first : first + CHUNK_ROWS].tolist()
                        rows = [groups[block].first_row + index for index in indices]
                        raw = reader.rows(indices)
                        yield from self._prompts(raw, groups[block].file, rows, epoch, position + first)

    def _prompts(
        self, raw: Sequence[RawRow], file: int, rows: Sequence[int], epoch: int, position: int
    ) -> Iterator[Prompt]:
        encoded = self._encode(raw, file, rows)
        for offset, (values, prompt, row) in enumerate(zip(raw, encoded, rows, strict=True)):
            where = self._source.where(file, row)
            if prompt is None:
                raise DataError(f"{where} changed while the job was using it. Start the job again.")
            yield Prompt(
                uid=f"e{epoch}-f{file}-r{row}",
                epoch=epoch,
                position=position + offset,
                token_ids=prompt.token_ids,
                text=prompt.text,
                ground_truth=ground_truth(values.reward, where),
                data=values.data,
                file=file,
                row=row,
            )

    def _encode(self, raw: Sequence[RawRow], file: int, rows: Sequence[int]) -> list[EncodedPrompt | None]:
        return self._encoder.encode_batch([row.prompt for row in raw], lambda i: self._source.where(file, rows[i]))


class PromptDataset(BlockDataset):
    """Prompts of Parquet files. The constructor checks the files' schemas; `scan()` checks their rows."""

    def __init__(self, files: Sequence[Path | str], options: DataOptions, encoder: PromptEncoder) -> None:
        super().__init__(ParquetSource(files, options), options, encoder)


class FunctionDataset(BlockDataset):
    """Prompts of a user's `module:function` that returns an iterable of dicts with the same keys as the columns.

    It is called once with `kwargs`, its rows are held in memory, and it must return the same ones when a job resumes.
    """

    def __init__(
        self, spec: str, options: DataOptions, encoder: PromptEncoder, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(FunctionSource(spec, options, kwargs), options, encoder)


def ground_truth(value: Any, where: str) -> str:
    """The ground truth as text; a whole number has no decimal point, so 42.0 from a float column is "42"."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}: the ground truth is {kind}, not text or a number. Fill it in, or remove the row.")
    if not math.isfinite(value):
        raise DataError(f"{where}: the ground truth is {value}. Fill it in, or remove the row.")
    return str(int(value)) if value == int(value) else str(value)


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
    return ["its row groups changed"] if saved["row_groups"] != current["row_groups"] else []
