"""What the coordinator tells about the run: the `/status` document and the Prometheus metrics.

Invariant: `/status` is complete at any time and says only what happened; a step counts when its weights are in service.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from grpo_worker.coordinator.members import Members
from grpo_worker.coordinator.saver import Saved
from grpo_worker.coordinator.weight_sync import WeightSync

PREFIX = "training/off_policy/trajectory_staleness"
# Gauges of the last step: metric name in metrics.jsonl -> name and help in Prometheus.
STEP_GAUGES = {
    "critic/score/mean": ("grpo_coordinator_reward_mean", "Mean score of the step's samples."),
    "critic/accuracy/mean": ("grpo_coordinator_train_accuracy_ratio", "Mean accuracy of the step's samples."),
    "val/accuracy/pass@1": ("grpo_coordinator_validation_accuracy_ratio", "Greedy accuracy on the validation prompts."),
    "response_length/mean": ("grpo_coordinator_response_length_tokens", "Mean response length."),
    "response_length/clip_ratio": (
        "grpo_coordinator_response_clipped_ratio",
        "Share of responses cut at the length limit.",
    ),
    f"{PREFIX}/mean": ("grpo_coordinator_staleness_mean", "Mean staleness of the samples, in versions."),
    f"{PREFIX}/max": ("grpo_coordinator_staleness_max", "Largest staleness of a sample, in versions."),
    "training/rollout_probs_diff_mean": (
        "grpo_coordinator_probs_diff_mean",
        "Mean difference of engine and trainer probabilities.",
    ),
    "rollout_corr/k3_kl": (
        "grpo_coordinator_mismatch_k3",
        "k3 estimate of the KL between engine and trainer, in nats.",
    ),
    "perf/throughput": (
        "grpo_coordinator_tokens_per_second",
        "Prompt and response tokens of the step a second and GPU.",
    ),
    "actor/entropy": ("grpo_coordinator_entropy", "Mean entropy of the policy, in nats."),
    "actor/ppo_kl": ("grpo_coordinator_ppo_kl", "KL of old and new policy in the last step, in nats."),
    "actor/pg_clipfrac": ("grpo_coordinator_clip_ratio", "Share of tokens whose ratio was clipped."),
    "actor/grad_norm": ("grpo_coordinator_grad_norm", "Global gradient norm before clipping."),
}


class Progress:
    """The run as the coordinator sees it."""

    def __init__(self, name: str, incarnation: str, members: Members, weights: WeightSync, total_epochs: int) -> None:
        self._name = name
        self._incarnation = incarnation
        self._members = members
        self._weights = weights
        self._total_epochs = total_epochs
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
        self._build_prometheus()

    def set(self, state: str, message: str) -> None:
        self.state, self.message = state, message

    def begin(self, step: int, total_steps: int, epoch: float) -> None:
        """The run starts (or goes on) after `step` steps."""
        self.step, self.total_steps, self.epoch = step, total_steps, epoch
        self._last_progress = time.time()
        self._gauge_step.set(step)
        self._gauge_total.set(total_steps)

    def stepped(self, step: int, total_steps: int, epoch: float, metrics: Mapping[str, float], prompts: int) -> None:
        """A step was finished; `total_steps` as far as the prompts that are left tell."""
        self.step, self.total_steps, self.epoch = step, total_steps, epoch
        self._metrics = dict(metrics)
        self._last_progress = time.time()
        if seconds := metrics.get("timing_s/step"):
            self._step_seconds = [*self._step_seconds[-19:], seconds]
            self._histogram.observe(seconds)
        self._gauge_step.set(step)
        self._gauge_total.set(total_steps)
        self._gauge_epoch.set(epoch)
        self._gauge_time.set(self._last_progress)
        self._count_prompts.inc(prompts)
        self._count_tokens.inc(metrics.get("perf/total_num_tokens", 0.0))
        self._gauges(metrics)

    def validated(self, metrics: Mapping[str, float]) -> None:
        self.accuracy = metrics.get("val/accuracy/pass@1", self.accuracy)
        self._gauges(metrics)

    def saved(self, saved: Saved) -> None:
        self.checkpoint = saved
        self._gauge_saved.set(saved.step)
        self._gauge_saved_time.set(saved.time)

    def kept(self, checkpoints: Sequence[Saved]) -> None:
        """These complete checkpoints exist, the newest first."""
        self._kept = tuple(checkpoints)

    def failed_samples(self, kinds: Mapping[str, int]) -> None:
        for kind, number in kinds.items():
            self._count_failures.labels(kind=kind).inc(number)

    def redispatched(self, number: int) -> None:
        self._count_redispatched.inc(number)

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

    def _gauges(self, metrics: Mapping[str, float]) -> None:
        for name, gauge in self._step_gauges.items():
            if name in metrics:
                gauge.set(metrics[name])

    def _build_prometheus(self) -> None:
        registry = self.registry
        self._step_gauges = {key: Gauge(name, text, registry=registry) for key, (name, text) in STEP_GAUGES.items()}
        self._gauge_step = Gauge("grpo_coordinator_step", "Steps finished.", registry=registry)
        self._gauge_total = Gauge("grpo_coordinator_total_steps", "Steps of the whole run.", registry=registry)
        self._gauge_epoch = Gauge("grpo_coordinator_epoch", "Passes over the data.", registry=registry)
        self._gauge_time = Gauge(
            "grpo_coordinator_last_progress_timestamp_seconds", "When the last step was finished.", registry=registry
        )
        self._gauge_saved = Gauge(
            "grpo_coordinator_checkpoint_step", "Step of the last complete checkpoint.", registry=registry
        )
        self._gauge_saved_time = Gauge(
            "grpo_coordinator_checkpoint_timestamp_seconds", "When it was completed.", registry=registry
        )
        self._histogram = Histogram(
            "grpo_coordinator_step_seconds",
            "Time of a step.",
            registry=registry,
            buckets=(1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600),
        )
        self._count_prompts = Counter("grpo_coordinator_trained_prompts", "Prompts trained on.", registry=registry)
        self._count_tokens = Counter(
            "grpo_coordinator_trained_tokens", "Prompt and response tokens trained on.", registry=registry
        )
        self._count_redispatched = Counter(
            "grpo_coordinator_redispatched_prompts", "Prompts sent to another engine.", registry=registry
        )
        self._count_failures = Counter(
            "grpo_coordinator_reward_failures",
            "Samples whose reward could not be computed.",
            ["kind"],
            registry=registry,
        )
        Gauge("grpo_coordinator_policy_version", "Newest published version.", registry=registry).set_function(
            lambda: float(self._weights.version if self._weights.version is not None else -1)
        )
        Gauge(
            "grpo_coordinator_rollouts_in_service", "Rollout servers that serve the current version.", registry=registry
        ).set_function(lambda: float(len(self._weights.in_service())))


def _checkpoint(saved: Saved) -> dict[str, Any]:
    return {"step": saved.step, "path": str(saved.path), "time": saved.time}
