"""The training loop: rollout -> reward -> advantage -> update -> publish, step after step.

Invariants:
- A step exists once its weights serve. A stop request ends the run between two steps, after a save.
- Whatever else ends the run, what the trainer has learned since the last save is saved first, unless the trainer itself failed.
"""

import asyncio
import os
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from grpo_worker import logs
from grpo_worker.config import Spec
from grpo_worker.coordinator.collector import Collector
from grpo_worker.coordinator.halt import Halt, Result
from grpo_worker.coordinator.learner import Learner
from grpo_worker.coordinator.members import Emit
from grpo_worker.coordinator.progress import Progress
from grpo_worker.coordinator.run_log import RunLog
from grpo_worker.coordinator.run_state import RunState
from grpo_worker.coordinator.saver import Saver
from grpo_worker.coordinator.schedule import Schedule
from grpo_worker.coordinator.scoring import Scorer, ScoreRange, nothing_to_train
from grpo_worker.coordinator.spans import Spans
from grpo_worker.coordinator.step_metrics import extra_reward_metrics, group_metrics, performance_metrics
from grpo_worker.coordinator.timing import StartupTimer, Timer
from grpo_worker.coordinator.trainer_client import TrainerLost
from grpo_worker.coordinator.validation import MakeDispatcher, Validation
from grpo_worker.coordinator.weight_sync import SyncReport, WeightSync
from grpo_worker.data.dataset import PromptDataset
from grpo_worker.environment import DEVICE_COUNT
from grpo_worker.errors import DataError, GRPOError, YieldedError


@dataclass
class Parts:
    """What the loop drives. Made by `coordinator.build`, so that each part can be replaced."""

    dataset: PromptDataset
    model: dict[str, Any]  # described, for the checkpoint
    schedule: Schedule
    halt: Halt
    collector: Collector
    make_dispatcher: MakeDispatcher
    scorer: Scorer
    learner: Learner
    weights: WeightSync
    saver: Saver
    validation: Validation | None
    log: RunLog
    progress: Progress
    emit: Emit
    startup: StartupTimer
    spans: Spans


class TrainingLoop:
    """Runs from the version that the schedule starts with (0, or a checkpoint's step) to its last one."""

    def __init__(self, spec: Spec, parts: Parts, updates: int) -> None:
        """`updates`: the optimizer's so far."""
        self._spec = spec
        self._parts = parts
        self._halt, self._collector = parts.halt, parts.collector
        self._step = parts.schedule.version
        self._updates = updates
        self._planned = parts.schedule.last_version
        self._scores = ScoreRange()
        self._unsaved: RunState | None = None  # of the last step that the trainer made
        self._metrics: dict[str, float] = {}  # of that step
        self._logged_step = self._validated_step = -1
        self._published = False
        self._redispatched = 0

    def stop(self, reason: str) -> None:
        """End after the step under way, saving first; what is no part of a step is broken off."""
        self._halt.ask(reason)

    async def run(self) -> None:
        """Raises YieldedError after a stop request; GRPOErrors as they come, after a save."""
        beside = [self._collector.dispatcher.run(), self._parts.weights.join_forever()]
        services = [asyncio.create_task(self._halt.watch(work)) for work in beside]
        try:
            await self._train()
        except Exception as error:
            await self._save_before_the_end(error)
            raise
        finally:
            for service in services:
                service.cancel()
            await asyncio.gather(*services, return_exceptions=True)

    async def _train(self) -> None:
        parts = self._parts
        parts.progress.begin(self._step, self._planned, self._epoch())
        await self._publish(parts.startup, "publish", "engines")
        if self._step == 0 and self._spec.trainer.val_before_train and parts.validation is not None:
            with parts.startup.part("validation"):
                metrics = await self._validate()
            if metrics:
                await parts.log.metrics(0, {"epoch": 0.0, **metrics})
        while self._step < parts.schedule.last_version and not self._halt.reason:
            parts.progress.set("Training", f"step {self._step + 1}")
            if not await self._one_step():
                break
        await self._end()

    async def _one_step(self) -> bool:
        """One step; False when the data has ended or a stop was asked for before it began."""
        parts, schedule = self._parts, self._parts.schedule
        timer = Timer(spans=parts.spans)
        logs.at(step=self._step + 1, version=self._step)
        batch = await self._collector.next_batch(timer)
        if batch is None:
            return False
        counts = parts.scorer.take_counts()
        self._scores.add([*batch.ready, *batch.filtered])
        if not batch.ready:
            await parts.log.batch(self._step + 1, batch)
            if schedule.at_end and self._step > 0:
                return False
            raise nothing_to_train(self._step + 1, batch.filtered, batch.failed)
        memory: dict[str, float] = {}
        if self._spec.colocated:
            with timer.part("sleep"):
                memory = await parts.weights.rest()
        credited, metrics = await parts.learner.learn(batch.ready, self._step + 1, schedule.last_version, timer)
        self._step += 1
        self._updates += len(credited.experience.mini_batch_sequences) * self._spec.actor.ppo_epochs
        self._unsaved, self._metrics = self._state(), metrics
        await parts.log.batch(self._step, batch, credited.sample_advantages)
        report = await self._publish(timer)  # of the version before, where engines take weights beside the training
        self._collector.trained(self._step)
        metrics |= report.metrics() | group_metrics(batch, self._step - 1) | extra_reward_metrics(batch.ready)
        metrics |= counts.metrics() | memory
        if self._due(self._spec.checkpoint.save_freq):
            with timer.part("save_checkpoint"):
                await self._save(self._unsaved)
        if self._due(self._spec.trainer.test_freq, at_the_end=True):
            with timer.part("testing"):
                metrics |= await self._validate()
        metrics |= performance_metrics(
            credited.experience, {**timer.seconds, "step": timer.elapsed()}, self._gpus()
        ) | parts.startup.first_step(timer)
        await self._log_step()
        parts.progress.stepped(self._step, schedule.last_version, self._epoch(), metrics)
        parts.progress.redispatched(self._collector.dispatcher.redispatched - self._redispatched)
        self._redispatched = self._collector.dispatcher.redispatched
        return True

    async def _publish(self, timer: Timer, publish: str = "update_weights", wait: str = "update_weights") -> SyncReport:
        """The trainer's weights become version `step`, and serve: at once on-policy, else beside the next step. `publish`, `wait`: names of
        the timer's parts. Returns how the last version that serves came to the engines."""
        beside = self._published and self._spec.rollout.max_staleness > 0
        with timer.part(publish):
            # An engine that lost that version on its way takes this one: the trainer, which has trained since, has the other no more.
            report = await self._parts.weights.settled() if beside else None
            await self._parts.weights.publish(self._step)
        with timer.part(wait):
            report = report or await self._settle()
        self._published = True
        return report

    async def _settle(self) -> SyncReport:
        """Until the published version serves."""
        weights, spec = self._parts.weights, self._spec
        report = await weights.settled()
        # All of them before the first step of this life: an on-policy step is split over the engines in service. Later, those that live.
        count = 1 if self._published else spec.rollout.min_replicas or spec.engines
        await self._unless_stopped(weights.wait_in_service(count, spec.failure_policy.startup_timeout_seconds))
        return report

    async def _validate(self) -> dict[str, float]:
        """Metrics of a validation after the present step; empty without one, or when a stop request breaks it off."""
        parts, step = self._parts, self._step
        if parts.validation is None:
            return {}
        parts.progress.set("Validating", f"{parts.validation.prompts} prompts after step {step}")
        self._validated_step = step
        await self._settle()
        result = await self._unless_stopped(parts.validation.run(parts.make_dispatcher, parts.scorer))
        if result is None:
            return {}
        parts.progress.validated(result.metrics)
        parts.emit(
            "info",
            "Validated",
            f"Validation: {result.headline} on {parts.validation.prompts} prompts after step {step}",
        )
        await parts.log.validation(step, result.groups)
        return result.metrics

    async def _unless_stopped(self, work: Coroutine[Any, Any, Result]) -> Result | None:
        """As `Halt.unless`; of a finished run nothing is broken off by a stop request while engines serve."""
        unfinished = self._step < self._parts.schedule.last_version
        return await self._halt.unless(work, asked=unfinished or not self._parts.weights.in_service())

    async def _save(self, state: RunState) -> None:
        self._parts.progress.set("Saving", f"step {state.step}")
        await self._parts.saver.save(state.epoch, state.step, asdict(state))

    async def _save_before_the_end(self, error: Exception) -> None:
        """Keep what the trainer has learned; what goes wrong with that is told, and `error` stays the reason of the end."""
        parts, state = self._parts, self._unsaved
        if state is None or isinstance(error, TrainerLost) or not getattr(error, "recoverable", True):
            return
        limit = self._spec.network.request_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                await self._save(state)
                await parts.saver.wait()
        except Exception as failure:
            reason = str(failure) or f"not done within {limit:.0f} s (network.requestTimeoutSeconds)"
            parts.emit(
                "error", "CheckpointFailed", f"step {state.step} was not saved before the end of the run: {reason}"
            )
        if self._logged_step < state.step:
            with suppress(GRPOError):  # the directory that cannot be written may be what ends the run
                await self._log_step()

    async def _end(self) -> None:
        """Save what the last save does not hold, and say how the run ended."""
        parts, step, asked = self._parts, self._step, self._halt.reason
        ended_early = step < self._planned and not asked
        if asked:
            parts.progress.set("Stopping", asked)
        elif ended_early:
            parts.emit(
                "warning",
                "DataEnded",
                f"the data ended after {step} of {self._planned} steps: prompts were filtered or failed",
            )
        await parts.saver.wait()
        if state := self._unsaved:
            self._unsaved = None  # no second try when this one fails
            await self._save(state)
            await parts.saver.finish(step)
        if ended_early and self._metrics and self._spec.trainer.test_freq > 0 and self._validated_step != step:
            self._metrics |= await self._validate()
            await self._log_step()
        if asked and step < parts.schedule.last_version:
            raise YieldedError(f"stopped after step {step} of {parts.schedule.last_version} ({asked})")
        if 0 < self._updates <= self._metrics.get("actor/skipped_updates", 0.0):
            raise DataError(
                f"none of the run's {self._updates} updates changed the weights (actor/skipped_updates), so it has learned nothing: "
                f"{self._scores.verdict()}"
            )
        parts.progress.set("Succeeded", f"{step} steps")
        parts.emit("info", "Succeeded", f"finished {step} steps")

    async def _log_step(self) -> None:
        self._logged_step = self._step
        self._metrics["epoch"] = self._epoch()
        await self._parts.log.metrics(self._step, self._metrics)
        await self._parts.log.spans(self._step, self._parts.spans.take())
        await asyncio.to_thread(self._parts.progress.measure_disks)

    def _state(self) -> RunState:
        """What a resumed coordinator needs."""
        parts, schedule = self._parts, self._parts.schedule
        return RunState(
            epoch=int(self._epoch()),
            step=self._step,
            updates=self._updates,
            model=parts.model,
            data=parts.dataset.state_dict(schedule.frontier),
            kl_controller=parts.learner.kl_controller.state_dict(),
            in_flight=[group.uid for group in schedule.window],
        )

    def _epoch(self) -> float:
        cursor = self._parts.schedule.frontier
        return cursor.epoch + cursor.position / self._parts.dataset.scan().kept

    def _due(self, frequency: int, *, at_the_end: bool = False) -> bool:
        last = at_the_end and self._step == self._parts.schedule.last_version
        return frequency > 0 and (self._step % frequency == 0 or last)

    def _gpus(self) -> int:
        """Devices of the job; trainer and engines may share them, which whoever placed them knows."""
        if placed := os.environ.get(DEVICE_COUNT):
            return int(placed)
        return self._spec.devices
