"""Every trajectory of a run, for who wants to look: a Parquet file a step and a validation, which `datasets` reads back.

Invariant: a file under its name is whole, and is of one step: a step that is repeated after a restart replaces it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_worker.coordinator.groups import Group, Sample
from grpo_worker.storage import storage_errors, whole_file

SCHEMA = pa.schema({
    "step": pa.int64(),
    "uid": pa.string(),  # of the prompt; those of a group are the same
    "sample": pa.int32(),
    "outcome": pa.string(),  # trained, filtered, failed; validation
    "source": pa.string(),
    "prompt": pa.large_string(),
    "response": pa.large_string(),  # with special tokens
    "ground_truth": pa.large_string(),
    "prompt_token_ids": pa.list_(pa.int32()),
    "token_ids": pa.list_(pa.int32()),
    "log_probs": pa.list_(pa.float32()),  # the engine's; NaN where nobody asked for them
    "sampled": pa.list_(pa.bool_()),  # False where an agent observed; null: all
    "versions": pa.list_(pa.struct({"version": pa.int64(), "start": pa.int64(), "end": pa.int64()})),
    "finish_reason": pa.string(),
    "score": pa.float64(),
    "accuracy": pa.float64(),
    "answer": pa.string(),
    "rewards": pa.string(),  # further numbers of the reward function, as JSON
    "advantage": pa.float64(),  # mean over the response's tokens; null where it was not trained on
})  # fmt: skip


class RolloutDump:
    """Writes NAME-STEP.parquet below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(
        self, name: str, step: int, groups: Mapping[str, Sequence[Group]], advantages: Iterable[float] = ()
    ) -> None:
        """
        Args:
            groups: by what became of them.
            advantages: of the samples in their order, as far as there are any.

        Raises ConfigError when the disk is full.
        """
        file = self._directory / f"{name}-{step:06d}.parquet"
        with storage_errors(self._directory, f"writing {file.name}", "the run directory"):
            self._directory.mkdir(parents=True, exist_ok=True)
            rows = list(_rows(step, groups, iter(advantages)))
            with whole_file(file) as temporary:
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary, compression="zstd")


def _rows(step: int, groups: Mapping[str, Sequence[Group]], advantages: Iterator[float]) -> Iterator[dict[str, Any]]:
    for outcome, some in groups.items():
        for group in some:
            for index, sample in enumerate(group.samples):
                yield _row(group, sample) | {
                    "step": step, "sample": index, "outcome": outcome, "advantage": next(advantages, None),
                }  # fmt: skip


def _row(group: Group, sample: Sample) -> dict[str, Any]:
    prompt, reward = group.prompt, sample.reward
    return {
        "uid": group.uid,
        "source": str(prompt.data.get("data_source") or ""),
        "prompt": prompt.text,
        "response": sample.raw_text,
        "ground_truth": prompt.ground_truth,
        "prompt_token_ids": prompt.token_ids,
        "token_ids": sample.token_ids,
        "log_probs": sample.log_probs,
        "sampled": sample.mask,
        "versions": [{"version": span.version, "start": span.start, "end": span.end} for span in sample.versions],
        "finish_reason": sample.finish_reason,
        "score": reward.score if reward else None,
        "accuracy": reward.accuracy if reward else None,
        "answer": reward.answer if reward else None,
        "rewards": json.dumps(reward.extra) if reward else None,
    }
