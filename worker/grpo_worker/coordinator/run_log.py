"""What a run writes down of each step: ledger, samples and metrics.

Invariant: a prompt stands in the ledger once the trainer has learned from it, and not before. A step waits for what is written of it; the event
loop does not.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_worker.coordinator.groups import Group, Sample
from grpo_worker.coordinator.otlp import SpanExporter
from grpo_worker.coordinator.rollout_dump import RolloutDump
from grpo_worker.coordinator.schedule import Batch
from grpo_worker.metric_loggers import MetricLoggers, StepFile


class RunLog:
    """One call an occasion; `metrics` may be written again for the same step."""

    def __init__(
        self,
        loggers: MetricLoggers,
        ledger: StepFile,
        samples: StepFile,
        spans: StepFile,
        exporter: SpanExporter | None,
        samples_kept: int,
        dump: RolloutDump | None = None,
    ) -> None:
        """`exporter`: gets the spans too; `samples_kept`: completions of each step and each validation; `dump`: gets all of them."""
        self._loggers = loggers
        self._ledger = ledger
        self._samples = samples
        self._spans = spans
        self._exporter = exporter
        self._samples_kept = samples_kept
        self._dump = dump

    async def batch(self, step: int, batch: Batch, advantages: Callable[[], Sequence[float]] = tuple) -> None:
        """What became of the prompts of a step, and the samples of one of them. `advantages` gives those of the samples that were trained on,
        and is asked where all are kept.

        Raises ConfigError when the disk is full.
        """
        await asyncio.to_thread(self._batch, step, batch, advantages)

    async def validation(self, step: int, groups: Sequence[Group]) -> None:
        """Raises ConfigError when the disk is full."""
        if self._dump is not None:
            await asyncio.to_thread(self._dump.write, "validation", step, {"validation": groups})
        for group in groups[: self._samples_kept]:
            await asyncio.to_thread(self._samples_of, "validation", step, group, group.samples)

    async def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises ConfigError when the disk is full."""
        await asyncio.to_thread(self._loggers.log, step, dict(metrics))

    async def spans(self, step: int, spans: Sequence[Mapping[str, Any]]) -> None:
        """Raises ConfigError when the disk is full."""
        await asyncio.to_thread(self._spans.write, step, {"spans": spans})
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.export, step, spans)

    def close(self) -> None:
        if self._exporter is not None:
            self._exporter.close()
        for each in (self._loggers, self._ledger, self._samples, self._spans):
            each.close()

    def _batch(self, step: int, batch: Batch, advantages: Callable[[], Sequence[float]]) -> None:
        named = {"trained": batch.ready, "filtered": batch.filtered, "failed": batch.failed}
        self._ledger.write(step, {key: [group.uid for group in groups] for key, groups in named.items()})
        if self._dump is not None:
            self._dump.write("train", step, named, advantages())
        for group in [*batch.ready, *batch.filtered][:1]:
            self._samples_of("train", step, group, group.samples[: self._samples_kept])

    def _samples_of(self, kind: str, step: int, group: Group, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._write(kind, step, group, sample)

    def _write(self, kind: str, step: int, group: Group, sample: Sample) -> None:
        record: dict[str, Any] = {
            "kind": kind,
            "uid": group.uid,
            "prompt": group.prompt.text,
            "response": sample.text,
            "ground_truth": group.prompt.ground_truth,
            "score": sample.reward.score if sample.reward else None,
            "accuracy": sample.reward.accuracy if sample.reward else None,
        }
        if sample.reward and sample.reward.extra:
            record["extra"] = sample.reward.extra
        if source := group.prompt.data.get("data_source"):
            record["source"] = str(source)
        self._samples.write(step, record)
