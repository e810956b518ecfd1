"""Procedural tasks of the reasoning-gym library as training data, made offline.

Invariant: the same task, size, seed and configuration give the same file. `entry` keeps the whole entry as JSON, which
is what the library's own verifier needs to score an answer.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo_worker.data.gsm8k import Split, Written
from grpo_worker.data.write import refuse_existing, write_shuffled
from grpo_worker.errors import DataError, UsageError

_SCHEMA = pa.schema([(name, pa.string()) for name in ("prompt", "response", "reward", "task", "entry")])


def make_reasoning_gym(
    task: str,
    size: int,
    seed: int,
    output: Path,
    config: Mapping[str, Any] | None = None,
    split: Split = "train",
    *,
    overwrite: bool = False,
) -> Written:
    """Write `size` problems of `task`; `config` are the task's own parameters.

    Give train and test different seeds: the same seed makes the same problems. `response` is the answer for test only.
    """
    if size < 1:
        raise UsageError(f"size {size} is less than 1. Ask for at least one problem.")
    if split not in ("train", "test"):
        raise UsageError(f"split {split!r} is not one of train, test.")
    refuse_existing(output, overwrite)
    dataset = _create(task, size, seed, dict(config or {}))
    rows = []
    for number in range(size):
        try:
            entry = dataset[number]
        except Exception as error:  # generators give up on parameters that leave them no problem to make
            raise DataError(f"reasoning-gym {task}: problem {number} cannot be made ({error}).") from error
        answer = "" if entry["answer"] is None else str(entry["answer"])
        rows.append(
            {
                "prompt": entry["question"],
                "response": answer if split == "test" else "",
                "reward": answer,
                "task": task,
                "entry": json.dumps(entry, default=_plain),
            }
        )
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    write_shuffled(table, output, seed=seed, overwrite=overwrite)
    return Written(output, size)


def _create(task: str, size: int, seed: int, config: dict[str, Any]) -> Any:
    # Here, since the import takes seconds and registers a hundred tasks.
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        near = difflib.get_close_matches(task, sorted(DATASETS), n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {len(DATASETS)}, such as basic_arithmetic."
        raise UsageError(f"reasoning-gym has no task {task!r}. {hint}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("size", "seed")]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"reasoning-gym {task} has no parameter {key!r}.{hint} It has {', '.join(known)}.")
    try:
        return create_dataset(task, size=size, seed=seed, **config)
    except (AssertionError, ValueError, TypeError) as error:
        raise UsageError(f"reasoning-gym {task} refuses its parameters: {error}.") from error


def _plain(value: Any) -> Any:
    """Metadata that JSON has no type for: NumPy values and sets by content, the rest by its text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return str(value)
