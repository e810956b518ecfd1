"""Prometheus metrics of a trainer, `grpo_trainer_*`.

Invariant: the registry is this trainer's alone.
"""

from prometheus_client import CollectorRegistry, generate_latest

from grpo_worker.catalogue import Declared
from grpo_worker.protocol.messages import LoadReply, TrainerReply, TrainerRequest, UpdateReply, UpdateRequest


class TrainerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._shown = Declared("trainer", self.registry)

    def record(self, request: TrainerRequest, reply: TrainerReply, seconds: float) -> None:
        operation = str(request.__struct_config__.tag)
        self._shown.counter("grpo_trainer_operations_total").labels(operation).inc()
        self._shown.counter("grpo_trainer_operation_seconds_total").labels(operation).inc(seconds)
        if isinstance(request, UpdateRequest) and isinstance(reply, UpdateReply):
            self._shown.set("grpo_trainer_step", request.step)
            self._shown.counter("grpo_trainer_tokens_total").inc(len(request.batch.token_ids.data) // 4)
            self._shown.follow(reply.metrics)
        if isinstance(reply, LoadReply):
            self._shown.set("grpo_trainer_step", reply.step)

    def text(self) -> bytes:
        return generate_latest(self.registry)
