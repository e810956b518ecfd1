"""What the coordinator tells about the run: the `/status` document and the Prometheus metrics.

Invariant: `/status` is complete at any time and says only what happened; a step counts when its weights are in service.
"""

import shutil
import time
from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry

from grpo_worker.catalogue import Declared, Number
from grpo_worker.config import Spec
from grpo_worker.coordinator.members import Members
from grpo_worker.coordinator.saver import Saved
from grpo_worker.coordinator.weight_sync import WeightSync

PREFIX = "training/off_policy/trajectory_staleness"


class Progress:
    """The run as the coordinator sees it."""

    def __init__(
        self,
        name: str,
        spec: Spec,
        incarnation: str,
        members: Members,
        weights: WeightSync,
        disks: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        """`disks`: directories whose file systems are watched, by name."""
        self._name = name
        self._disks = disks
        self._incarnation = incarnation
        self._members = members
        self._weights = weights
        self._total_epochs = spec.trainer.total_epochs
        self.state = "Starting"
        self.message = "waiting for the trainer"
        self.step = 0
        self.total_steps = 0
        self.epoch = 0.0
        self.accuracy: float | None = None
        self.checkpoint: Saved | None = None
        self._kept: tuple[Saved, ...] = ()
        self._metrics: dict[str, float] = {}
        self._step_seconds: list[float] = []
        self._started = self._last_progress = time.time()
        self.registry = CollectorRegistry()
        self._shown = Declared("coordinator", self.registry)
        self._shown.set("grpo_coordinator_rollouts_min", spec.rollout.min_replicas or spec.engines)
        self._shown.set("grpo_coordinator_staleness_limit", spec.rollout.max_staleness)
        self._shown.ask(self._at_scrape)

    def set(self, state: str, message: str) -> None:
        self.state, self.message = state, message

    def begin(self, step: int, total_steps: int, epoch: float) -> None:
        """The run starts (or goes on) after `step` steps."""
        self.step, self.total_steps, self.epoch = step, total_steps, epoch
        self._advanced()

    def stepped(self, step: int, total_steps: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """A step was finished; `total_steps` as far as the prompts that are left tell."""
        self.step, self.total_steps, self.epoch = step, total_steps, epoch
        self._metrics = dict(metrics)
        if seconds := metrics.get("timing_s/step"):
            self._step_seconds = [*self._step_seconds[-19:], seconds]
        self._advanced()
        self._shown.follow(metrics)

    def validated(self, metrics: Mapping[str, float]) -> None:
        self.accuracy = metrics.get("val/accuracy/pass@1", self.accuracy)
        self._shown.follow(metrics)

    def saved(self, saved: Saved) -> None:
        self.checkpoint = saved
        self._shown.set("grpo_coordinator_checkpoint_step", saved.step)
        self._shown.set("grpo_coordinator_checkpoint_timestamp_seconds", saved.time)

    def kept(self, checkpoints: Sequence[Saved]) -> None:
        """These complete checkpoints exist, the newest first."""
        self._kept = tuple(checkpoints)

    def redispatched(self, number: int) -> None:
        self._shown.counter("grpo_coordinator_redispatched_prompts_total").inc(number)

    def measure_disks(self) -> None:
        """In a thread: a file system that hangs stops who asks."""
        for name, path in self._disks.items():
            with suppress(OSError):
                usage = shutil.disk_usage(path)
                self._shown.set("grpo_coordinator_disk_free_bytes", usage.free, name)
                self._shown.set("grpo_coordinator_disk_size_bytes", usage.total, name)

    def status(self) -> dict[str, Any]:
        """The `/status` document."""
        metrics, serving = self._metrics, {member.name for member in self._weights.in_service()}
        timing = {
            key.removeprefix("timing_s/"): value
            for key, value in metrics.items()
            if key.startswith("timing_s/") and not key.startswith("timing_s/trainer_")  # parts of the parts
        }
        return {
            "name": self._name,
            "state": self.state,
            "message": "; ".join([self.message, *self._members.waits()]),
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": self.epoch,
            "total_epochs": self._total_epochs,
            "policy_version": self._weights.version,
            "reward": metrics.get("critic/score/mean"),
            "accuracy": self.accuracy,
            "train_accuracy": metrics.get("critic/accuracy/mean"),
            "response_length": metrics.get("response_length/mean"),
            "kl": metrics.get("actor/kl_loss", metrics.get("actor/reward_kl_penalty", metrics.get("actor/ppo_kl"))),
            "tokens_per_second": metrics.get("perf/throughput"),
            "timing_seconds": timing,
            "staleness": {"mean": metrics.get(f"{PREFIX}/mean"), "max": metrics.get(f"{PREFIX}/max")},
            "checkpoint": _checkpoint(self.checkpoint) if self.checkpoint else None,
            "checkpoints": [_checkpoint(saved) for saved in self._kept],
            "members": [
                {
                    "role": member.beat.role,
                    "name": member.name,
                    "state": self._members.state(member),
                    "in_service": member.name in serving,
                    "weight_version": member.served,
                    "url": member.url,
                    "stats": member.beat.stats,
                }
                for member in self._members.all()
            ],
            "eta_seconds": self._eta(),
            "started_time": self._started,
            "last_progress_time": self._last_progress,
            "incarnation": self._incarnation,
        }

    def last_word(self) -> dict[str, object]:
        """What the termination message adds to reason and message: its reader may have missed the last `/status`."""
        told = ("step", "total_steps", "epoch", "reward", "accuracy", "policy_version")
        status = self.status()
        return {
            **{key: status[key] for key in told},
            "checkpoint": str(self.checkpoint.path) if self.checkpoint else None,
        }

    def _eta(self) -> float | None:
        if not self._step_seconds:
            return None
        return sum(self._step_seconds) / len(self._step_seconds) * max(self.total_steps - self.step, 0)

    def _advanced(self) -> None:
        self._last_progress = time.time()
        numbers = {"step": self.step, "total_steps": self.total_steps, "epoch": self.epoch}
        numbers["last_progress_timestamp_seconds"] = self._last_progress
        for name, value in numbers.items():
            self._shown.set(f"grpo_coordinator_{name}", value)

    def _at_scrape(self) -> Iterator[Number]:
        yield "grpo_coordinator_policy_version", (), -1 if self._weights.version is None else self._weights.version
        yield "grpo_coordinator_rollouts_in_service", (), len(self._weights.in_service())
        standing = Tally((member.beat.role, self._members.state(member)) for member in self._members.all())
        for labels, count in standing.items():
            yield "grpo_coordinator_members", labels, count


def _checkpoint(saved: Saved) -> dict[str, Any]:
    return {"step": saved.step, "path": str(saved.path), "time": saved.time}
