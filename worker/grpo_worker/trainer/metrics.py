"""Prometheus metrics of a trainer, `grpo_trainer_*`.

Invariant: base units, `_total` for counters, no names of objects as labels; the registry is this trainer's alone.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from grpo_worker.protocol.messages import LoadReply, TrainerReply, TrainerRequest, UpdateReply, UpdateRequest

GAUGES = {
    "actor/grad_norm": ("grpo_trainer_grad_norm", "Global gradient norm before clipping, mean of the last step."),
    "actor/lr": ("grpo_trainer_learning_rate", "Learning rate of the last step."),
    "actor/pg_loss": ("grpo_trainer_policy_loss", "Policy loss of the last step."),
    "actor/pg_clipfrac": ("grpo_trainer_clip_fraction", "Share of tokens that the clip range cut in the last step."),
    "actor/ppo_kl": ("grpo_trainer_ppo_kl", "Mean of old log-prob minus log-prob over the last step."),
    "actor/entropy": ("grpo_trainer_entropy", "Entropy of the policy in the last step, nats."),
    "timing_s/trainer_update": ("grpo_trainer_update_seconds", "Time of the last update."),
    "actor/skipped_updates": (
        "grpo_trainer_skipped_updates",
        "Updates skipped so far: no valid token, or no finite norm.",
    ),
}
GIB = 1024**3


class TrainerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges = {key: Gauge(name, text, registry=self.registry) for key, (name, text) in GAUGES.items()}
        self._step = Gauge("grpo_trainer_step", "Training steps done.", registry=self.registry)
        self._memory = Gauge(
            "grpo_trainer_max_memory_allocated_bytes",
            "Peak device memory of the last step, worst rank.",
            registry=self.registry,
        )
        self._tokens = Counter("grpo_trainer_tokens_total", "Tokens trained on.", registry=self.registry)
        self._operations = Counter(
            "grpo_trainer_operations_total", "Operations done.", ["operation"], registry=self.registry
        )
        self._seconds = Counter(
            "grpo_trainer_operation_seconds_total", "Time spent in operations.", ["operation"], registry=self.registry
        )

    def record(self, request: TrainerRequest, reply: TrainerReply, seconds: float) -> None:
        operation = str(request.__struct_config__.tag)
        self._operations.labels(operation).inc()
        self._seconds.labels(operation).inc(seconds)
        if isinstance(request, UpdateRequest) and isinstance(reply, UpdateReply):
            self._step.set(request.step)
            self._tokens.inc(len(request.batch.token_ids.data) // 4)
            for key, gauge in self._gauges.items():
                if key in reply.metrics:
                    gauge.set(reply.metrics[key])
            self._memory.set(reply.metrics.get("perf/max_memory_allocated_gb", 0.0) * GIB)
        if isinstance(reply, LoadReply):
            self._step.set(reply.step)

    def text(self) -> bytes:
        return generate_latest(self.registry)
