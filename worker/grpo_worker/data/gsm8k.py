"""GSM8K (Cobbe et al., 2021, arXiv:2110.14168) as training data.

Invariant: every row's ground truth is the one number after the last `####` of its answer, as the grader reads it. A row that has
none, or several, stops the conversion and is named: no row is skipped.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_worker.data.files import MAGIC
from grpo_worker.data.write import refuse_existing, write_shuffled
from grpo_worker.errors import DataError, UsageError
from grpo_worker.rewards.gsm8k import MARK, parse_ground_truth
from grpo_worker.rewards.numbers import as_text

Split = Literal["train", "test"]

INSTRUCTION = 'Reason step by step, and put the final number after "####".'

_TEXT_COLUMNS = ("prompt", "response", "reward", "split")
_SCHEMA = pa.schema([*((name, pa.string()) for name in _TEXT_COLUMNS), ("index", pa.int64())])


@dataclass(frozen=True)
class Written:
    """A converter's result."""

    output: Path
    rows: int


def final_number(answer: str) -> str | None:
    """The one number after the last `####`, as digits, a point and a minus sign, or `a/b`; None when there is none, or several."""
    try:
        return as_text(parse_ground_truth(answer)) if MARK in answer else None
    except ValueError:
        return None


def convert_gsm8k(
    inputs: Sequence[Path],
    output: Path,
    split: Split,
    instruction: str | None = INSTRUCTION,
    seed: int = 0,
    *,
    overwrite: bool = False,
) -> Written:
    """Read question/answer rows from Parquet or JSON Lines files; write prompt, response, reward, split, index.

    `response` is empty for training and the full answer for test. `instruction` follows the question on its own line.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split {split!r} is not one of train, test.")
    if not inputs:
        raise UsageError("no GSM8K file is given. Name its Parquet or JSON Lines files.")
    refuse_existing(output, overwrite)
    rows: list[dict[str, Any]] = []
    for path in inputs:
        for number, source in enumerate(_read(path)):
            question, answer = _question_and_answer(source, f"{path}: row {number}")
            reward = final_number(answer)
            if reward is None:
                raise DataError(
                    f"{path}: row {number} has not one number after '####' in its answer ({answer[-40:]!r}). "
                    "Correct or remove the row."
                )
            prompt = f"{question}\n{instruction}" if instruction else question
            response = answer if split == "test" else ""
            rows.append({"prompt": prompt, "response": response, "reward": reward, "split": split, "index": len(rows)})
    if not rows:
        raise DataError(f"{', '.join(str(path) for path in inputs)}: no rows.")
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    write_shuffled(table, output, seed=seed, overwrite=overwrite)
    return Written(output, len(rows))


def _question_and_answer(row: Any, where: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}, not an object with question and answer.")
    for key in ("question", "answer"):
        if key not in row:
            raise DataError(f"{where} has no {key!r} (it has {', '.join(row)}). GSM8K has question and answer.")
        if not isinstance(row[key], str) or not row[key].strip():
            raise DataError(f"{where} has no text in {key!r}. Correct or remove the row.")
    return row["question"], row["answer"]


def _read(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            is_parquet = file.read(len(MAGIC)) == MAGIC
        if is_parquet:
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches():
                    yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8") as lines:
            for line_number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse_line(line, path, line_number)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path} cannot be read as Parquet or JSON Lines: {reason}.") from error


def _parse_line(line: str, path: Path, line_number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {line_number} is not JSON ({error.msg}). Each line must be one object."
        ) from error
