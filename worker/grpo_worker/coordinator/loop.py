"""The training loop: rollout -> reward -> advantage -> update -> publish, step after step.

Invariants:
- maxStaleness 0: a step's prompts are generated with the weights of the step before, by idle engines, in requests whose results do not
  depend on timing; so the run is a function of the document and the data.
- maxStaleness 1 and more: the feeder keeps the engines busy while the trainer updates; `Schedule` bounds how far they run ahead.
- A step exists once its weights serve. A stop request ends the run between two steps, after a save.
"""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from grpo_worker.algorithms import AdvantageEstimator, KLController
from grpo_worker.config import Spec
from grpo_worker.coordinator.dispatch import DispatchOptions, RolloutDispatcher
from grpo_worker.coordinator.experience import Credited, assemble, assign_credit
from grpo_worker.coordinator.groups import Group, GroupState
from grpo_worker.coordinator.progress import Progress
from grpo_worker.coordinator.records import StepRecords
from grpo_worker.coordinator.saver import Saver
from grpo_worker.coordinator.schedule import Batch, Schedule
from grpo_worker.coordinator.scoring import Scorer
from grpo_worker.coordinator.step_metrics import (
    experience_metrics,
    extra_reward_metrics,
    group_metrics,
    performance_metrics,
)
from grpo_worker.coordinator.trainer_client import TrainerClient
from grpo_worker.coordinator.validation import Validation
from grpo_worker.coordinator.weight_sync import Emit, SyncReport, WeightSync
from grpo_worker.data.dataset import BlockDataset
from grpo_worker.environment import DEVICE_COUNT
from grpo_worker.errors import DataError, StalledError, YieldedError
from grpo_worker.metric_loggers import MetricLoggers
from grpo_worker.protocol.messages import LogProbsReply, LogProbsRequest, UpdateReply, UpdateRequest

Result = TypeVar("Result")


class Timer:
    """Seconds by part of the step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def part(self, name: str) -> Any:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def total(self) -> dict[str, float]:
        return {**self.seconds, "step": time.monotonic() - self._started}


@dataclass
class Parts:
    """What the loop drives. Made by `coordinator.main`, so that each part can be replaced."""

    dataset: BlockDataset
    schedule: Schedule
    make_dispatcher: Callable[[DispatchOptions, Callable[[Group], None]], RolloutDispatcher]
    dispatch_options: DispatchOptions
    scorer: Scorer
    estimator: AdvantageEstimator
    kl_controller: KLController
    trainer: TrainerClient
    weights: WeightSync
    saver: Saver
    validation: Validation | None
    loggers: MetricLoggers
    ledger: StepRecords
    samples: StepRecords
    progress: Progress
    emit: Emit


class TrainingLoop:
    """Runs from `step` (0, or a checkpoint's) to `total_steps`."""

    def __init__(self, spec: Spec, parts: Parts, step: int, total_steps: int) -> None:
        self._spec = spec
        self._parts = parts
        self.dispatcher = parts.make_dispatcher(parts.dispatch_options, self._on_generated)  # runs beside `run`
        self._step = step
        self._total_steps = total_steps
        self._overlapped = spec.rollout.max_staleness > 0
        self._group_ended = asyncio.Event()
        self._generated_at = time.monotonic()
        self._stop_reason = ""
        self._stopped = asyncio.Event()
        self._published = False
        self._redispatched = 0
        self._metrics: dict[str, float] = {}  # of the last step
        self._validated_step = -1

    def stop(self, reason: str) -> None:
        """End after the step under way, saving first; what is no part of a step is broken off."""
        self._stop_reason = self._stop_reason or reason
        self._stopped.set()
        self._group_ended.set()

    def _on_generated(self, group: Group) -> None:
        """A group came back from an engine, or failed."""
        self._generated_at = time.monotonic()
        if group.state is GroupState.FAILED:
            self._on_ended(group)
        else:
            self._parts.scorer.submit(group, self._on_ended)

    async def run(self) -> None:
        """Raises YieldedError after a stop request; GRPOErrors as they come."""
        parts = self._parts
        parts.progress.begin(self._step, self._total_steps, self._epoch())
        timer = Timer()
        with timer.part("update_weights"):
            await self._publish()
        if self._step == 0 and self._spec.trainer.val_before_train and (metrics := await self._validate(0)):
            parts.loggers.log(0, {"epoch": 0.0, **metrics})
        while self._step < self._total_steps and not self._stop_reason:
            parts.progress.set("Training", f"step {self._step + 1}")
            if not await self._one_step():
                break
        await self._end()

    async def _one_step(self) -> bool:
        """One step; False when the data has ended or a stop was asked for before it began."""
        parts, timer = self._parts, Timer()
        waited = time.monotonic()
        batch = await self._collect()
        if batch is None:
            return False
        arrived = time.monotonic()
        timer.seconds["gen"] = max(min(self._generated_at, arrived) - waited, 0.0)
        timer.seconds["reward"] = arrived - waited - timer.seconds["gen"]
        counts = parts.scorer.take_counts()
        credited, metrics = await self._update(batch, timer)
        with timer.part("update_weights"):
            report = await self._publish()
        parts.schedule.trained(self._step)
        if self._overlapped:
            self._feed()
        self._record(batch)
        metrics |= report.metrics() | group_metrics(batch, self._step - 1) | extra_reward_metrics(batch.ready)
        metrics |= {
            "reward/failures": float(counts.failed),
            **{f"reward/{kind}": float(n) for kind, n in counts.kinds.items()},
        }
        parts.progress.failed_samples(counts.kinds)
        if self._save_due():
            with timer.part("save_checkpoint"):
                await self._save()
        if self._validation_due():
            with timer.part("testing"):
                metrics |= await self._validate(self._step)
        metrics |= performance_metrics(credited.experience, timer.total(), self._gpus())
        epoch = self._epoch()
        parts.loggers.log(self._step, {"epoch": epoch, **metrics})
        parts.progress.stepped(self._step, epoch, metrics, len(batch.ready))
        parts.progress.redispatched(self.dispatcher.redispatched - self._redispatched)
        self._redispatched = self.dispatcher.redispatched
        self._metrics = {"epoch": epoch, **metrics}
        return True

    async def _collect(self) -> Batch | None:
        """The next step's groups; None at the end of the data or on a stop request."""
        parts, schedule = self._parts, self._parts.schedule
        deadline = time.monotonic() + self._spec.failure_policy.stall_timeout_seconds
        while True:
            self._group_ended.clear()
            parts.scorer.raise_failure()
            if self._stop_reason:
                return None
            if stale := schedule.reject_stale():
                parts.emit(
                    "warning",
                    "StaleSamples",
                    f"{len(stale)} groups were older than rollout.maxStaleness and are generated again",
                )
                self.dispatcher.submit(stale, atomic=False)
            self._feed()
            if schedule.available():
                batch = schedule.take()
                if batch.ready:
                    return batch
                self._nothing_to_train(batch)
                if schedule.at_end:
                    return None
                continue
            if time.monotonic() > deadline:
                waiting = [group.uid for group in schedule.window if not group.done]
                raise StalledError(
                    f"step {self._step + 1}: {len(waiting)} prompts did not come back within {self._spec.failure_policy.stall_timeout_seconds:.0f} s "
                    f"(failurePolicy.stallTimeoutSeconds), the first: {', '.join(waiting[:5])}"
                )
            try:
                async with asyncio.timeout(1.0):
                    await self._group_ended.wait()
            except TimeoutError:
                continue

    def _nothing_to_train(self, batch: Batch) -> None:
        """A batch without a single group to train on: at the data's end, or since every prompt failed. Raises DataError."""
        self._record(batch, step=self._step + 1)
        self._parts.scorer.take_counts()
        if batch.failed and not (self._parts.schedule.at_end and self._step > 0):
            raise DataError(
                f"step {self._step + 1}: none of its {len(batch.failed)} prompts could be trained on. "
                f"The last one, {batch.failed[-1].uid}: {batch.failed[-1].failure}"
            )

    async def _update(self, batch: Batch, timer: Timer) -> tuple[Credited, dict[str, float]]:
        spec, parts = self._spec, self._parts
        experience = assemble(batch.ready, spec.actor.ppo_mini_batch_size)
        reference = spec.algorithm.use_kl_in_reward or spec.actor.use_kl_loss
        actor = not spec.algorithm.rollout_correction.bypass_mode
        log_probs: LogProbsReply | None = None
        with timer.part("old_log_prob"):
            if actor or reference:
                request = LogProbsRequest(batch=experience.wire(), actor=actor, reference=reference)
                log_probs = await parts.trainer.call(request, LogProbsReply)
        with timer.part("adv"):
            credited = await asyncio.to_thread(
                assign_credit,
                experience,
                log_probs,
                spec.algorithm,
                parts.estimator,
                parts.kl_controller,
                spec.data.max_response_length,
            )
        with timer.part("update_actor"):
            reply = await parts.trainer.call(
                UpdateRequest(step=self._step + 1, total_steps=self._total_steps, batch=credited.wire()), UpdateReply
            )
        self._step += 1
        metrics = (
            experience_metrics(credited, spec.data.max_response_length)
            | (log_probs.metrics if log_probs else {})
            | reply.metrics
        )
        return credited, metrics

    async def _publish(self) -> SyncReport:
        """The trainer's weights become version `step` and serve."""
        parts, spec = self._parts, self._spec
        report = await parts.weights.publish(self._step)
        # All of them before the first step of this life: an on-policy step is split over the engines in service. Later, those that live.
        count = 1 if self._published else spec.rollout.min_replicas or spec.rollout.replicas
        await self._unless_stopped(parts.weights.wait_in_service(count, spec.failure_policy.startup_timeout_seconds))
        self._published = True
        return report

    async def _validate(self, step: int) -> dict[str, float]:
        parts = self._parts
        if parts.validation is None:
            return {}
        parts.progress.set("Validating", f"{parts.validation.prompts} prompts after step {step}")
        self._validated_step = step
        result = await self._unless_stopped(parts.validation.run(parts.make_dispatcher, parts.scorer))
        if result is None:
            return {}
        parts.progress.validated(result.metrics)
        parts.emit(
            "info",
            "Validated",
            f"Validation: accuracy {result.accuracy:.3f} on {parts.validation.prompts} prompts after step {step}",
        )
        for group in result.groups[: self._spec.trainer.log_samples]:
            for sample in group.samples:
                parts.samples.write(step, _sample_record("validation", group, sample.text, sample.reward))
        return result.metrics

    async def _unless_stopped(self, work: Coroutine[Any, Any, Result]) -> Result | None:
        """The result of `work`; None when a stop request comes first. Nothing of the finished run's last step is broken off."""
        if self._step >= self._total_steps:
            return await work
        tasks = asyncio.create_task(work), asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _save(self) -> None:
        parts = self._parts
        parts.progress.set("Saving", f"step {self._step}")
        await parts.saver.save(int(self._epoch()), self._step, self._state())

    async def _end(self) -> None:
        """Save what the last save does not hold, and say how the run ended."""
        parts = self._parts
        ended_early = self._step < self._total_steps and not self._stop_reason
        if self._stop_reason:
            parts.progress.set("Stopping", self._stop_reason)
        elif ended_early:
            parts.emit(
                "warning",
                "DataEnded",
                f"the data ended after {self._step} of {self._total_steps} steps: prompts were filtered or failed",
            )
        await parts.saver.wait()
        if self._step > 0:
            await self._save()
            await parts.saver.finish(self._step)
        if ended_early and self._metrics and self._spec.trainer.test_freq > 0 and self._validated_step != self._step:
            parts.loggers.log(self._step, self._metrics | await self._validate(self._step))
        if self._stop_reason and self._step < self._total_steps:
            raise YieldedError(f"stopped after step {self._step} of {self._total_steps} ({self._stop_reason})")
        parts.progress.set("Succeeded", f"{self._step} steps")
        parts.emit("info", "Succeeded", f"finished {self._step} steps")

    def _feed(self) -> None:
        """Admit what the schedule allows and send it out."""
        parts, rollout = self._parts, self._spec.rollout
        if self._stop_reason:
            return
        if admitted := parts.schedule.admit():
            samples = len(admitted) * rollout.n
            parts.emit(
                "info",
                "Rollout",
                f"Rollout: generating {len(admitted)} prompts x {rollout.n} samples = {samples} trajectories",
            )
            self.dispatcher.submit(admitted, atomic=not self._overlapped)

    def _on_ended(self, group: Group) -> None:
        self._group_ended.set()
        if self._overlapped:
            self._feed()

    def _record(self, batch: Batch, step: int | None = None) -> None:
        """What became of a batch's prompts; those of a step that was not made stand under its number."""
        named = {"trained": batch.ready, "filtered": batch.filtered, "failed": batch.failed}
        self._parts.ledger.write(
            self._step if step is None else step,
            {key: [group.uid for group in groups] for key, groups in named.items()},
        )
        for group in batch.ready[:1]:
            for sample in group.samples[: self._spec.trainer.log_samples]:
                self._parts.samples.write(self._step, _sample_record("train", group, sample.text, sample.reward))

    def _state(self) -> Mapping[str, Any]:
        """What a resumed coordinator needs."""
        schedule = self._parts.schedule
        return {
            "step": self._step,
            "data": self._parts.dataset.state_dict(schedule.frontier),
            "in_flight": [group.uid for group in schedule.window],  # generated again after a resume
            "kl_controller": self._parts.kl_controller.state_dict(),
        }

    def _epoch(self) -> float:
        cursor = self._parts.schedule.frontier
        return cursor.epoch + cursor.position / self._parts.dataset.scan().kept

    def _save_due(self) -> bool:
        frequency = self._spec.checkpoint.save_freq
        return frequency > 0 and self._step % frequency == 0

    def _validation_due(self) -> bool:
        frequency = self._spec.trainer.test_freq
        return frequency > 0 and (self._step % frequency == 0 or self._step == self._total_steps)

    def _gpus(self) -> int:
        """Devices of the job; trainer and engines may share them, which whoever placed them knows."""
        if placed := os.environ.get(DEVICE_COUNT):
            return int(placed)
        return self._spec.devices


def _sample_record(kind: str, group: Group, text: str, reward: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "uid": group.uid,
        "prompt": group.prompt.text,
        "response": text,
        "ground_truth": group.prompt.ground_truth,
        "score": reward.score if reward else None,
        "accuracy": reward.accuracy if reward else None,
    }
