"""The trainer's operations, as every rank runs them.

Invariant: each operation is collective and leaves the same state on all ranks; a request that is wrong in itself is
refused on all of them before anything has changed.
"""

import os
import time
from pathlib import Path
from typing import assert_never

from grpo_worker import logs
from grpo_worker.environment import DEVICE_COUNT
from grpo_worker.errors import DataError
from grpo_worker.protocol.messages import (
    Array,
    Done,
    LoadReply,
    LoadRequest,
    LogProbsReply,
    LogProbsRequest,
    PublishReply,
    PublishRequest,
    SaveReply,
    SaveRequest,
    SaveStatusReply,
    SaveStatusRequest,
    StopRequest,
    TrainBatch,
    TrainerReply,
    TrainerRequest,
    UpdateReply,
    UpdateRequest,
)
from grpo_worker.trainer.batch import Sequences
from grpo_worker.trainer.distributed import Ranks
from grpo_worker.trainer.failures import OperationRefused
from grpo_worker.trainer.model import (
    PolicyModel,
    build_policy,
    check_length,
    load_config,
    set_float32_precision,
)
from grpo_worker.trainer.optimizer import PolicyOptimizer
from grpo_worker.trainer.options import TrainerOptions
from grpo_worker.trainer.publish import Publisher
from grpo_worker.trainer.self_check import check_model
from grpo_worker.trainer.shards import ShardStore
from grpo_worker.trainer.turns import Turns
from grpo_worker.trainer.update import TrainerState, Updater, compute_log_probs, memory_metrics
from grpo_worker.trainer.user_loss import policy_loss
from grpo_worker.weightsync.server import WeightServer
from grpo_worker.weightsync.snapshot import SnapshotStore


class TrainerEngine:
    """Policy, optimizer, reference, and what is done with them."""

    def __init__(self, options: TrainerOptions, ranks: Ranks, token: str = "") -> None:
        self.options = options
        self.ranks = ranks
        self.state = TrainerState()
        spec = options.spec
        self.turns = Turns(options, ranks)
        loss = policy_loss(spec.actor.loss_mode)
        set_float32_precision(spec.model.dtype == "tf32")
        config = load_config(options.model_directory)
        check_length(config, options)
        scale = check_model(config, spec.model.use_remove_padding, options.max_sequence_tokens)
        offload = spec.actor.fsdp
        self.model = build_policy(options, ranks.mesh, logit_scale=scale, param_offload=offload.param_offload)
        # The reference is the model that training began with, never a checkpoint's.
        self.reference: PolicyModel | None = None
        if options.reference:
            self.reference = build_policy(
                options,
                ranks.mesh,
                logit_scale=scale,
                trainable=False,
                param_offload=spec.ref.fsdp.param_offload,
            )
        self.optimizer = PolicyOptimizer(self.model, spec.actor.optim, ranks, offload.optimizer_offload)
        if self.turns.moments_leave:
            self.optimizer.rest()
        self.updater = Updater(self.model, self.optimizer, options, ranks, loss, self.state)
        if options.compile and self._may_warm_up():
            self.updater.warm_up()  # while the engines start
        self.store = SnapshotStore(timeout_seconds=spec.network.weight_sync_timeout_seconds) if ranks.is_first else None
        self.weights = None
        if self.store is not None:
            network = spec.network
            self.weights = WeightServer(
                self.store,
                options.host,
                network.weight_sync_port,
                token,
                timeout_seconds=network.member_timeout_seconds,
            )
        self.publisher = Publisher(
            ranks,
            options.rollout_dtype,
            self.store,
            self.weights,
            options.advertised_host,
            meeting_host=options.host if options.may_group else "",
        )
        self.shards = ShardStore(
            self.model,
            self.optimizer,
            ranks,
            options.compute_dtype,
            options.model_directory,
            spec.trainer.seed,
            spec.trainer.process_group_timeout_seconds,
        )

    def _may_warm_up(self) -> bool:
        """Not where an engine that starts takes what is left of the device by measuring it."""
        spec, placed = self.options.spec, os.environ.get(DEVICE_COUNT)
        if spec.colocated:
            return self.turns.may_warm_up
        return placed is None or int(placed) >= spec.devices

    def run(self, request: TrainerRequest) -> TrainerReply:
        """Run one operation. Raises OperationRefused when the request is at fault."""
        match request:
            case LogProbsRequest():
                return self.log_probs(request)
            case UpdateRequest():
                logs.at(step=request.step)
                return self.update(request)
            case PublishRequest():
                logs.at(version=request.version)
                return self.publish(request)
            case SaveRequest():
                return SaveReply(stall_seconds=self.shards.save(Path(request.directory), self.state))
            case SaveStatusRequest():
                return self.save_status(request.wait_seconds)
            case LoadRequest():
                return self.load(request)
            case StopRequest():
                return Done()
        assert_never(request)

    def log_probs(self, request: LogProbsRequest) -> LogProbsReply:
        sequences = _sequences(request.batch)
        metrics: dict[str, float] = {}
        log_probs = entropy = ref_log_probs = None
        if request.reference and self.reference is None:
            raise OperationRefused(
                DataError(
                    "compute_log_probs: no reference model was built. Set actor.useKLLoss or algorithm.useKLInReward."
                )
            )
        if request.actor:
            started = time.perf_counter()
            log_probs, entropy = compute_log_probs(
                self.model, sequences, self.options, self.ranks, self.options.spec.rollout
            )
            metrics["timing_s/trainer_log_probs"] = time.perf_counter() - started
        if request.reference:
            assert self.reference is not None
            started = time.perf_counter()
            ref_log_probs, _ = compute_log_probs(
                self.reference, sequences, self.options, self.ranks, self.options.spec.ref
            )
            metrics["timing_s/trainer_ref_log_probs"] = time.perf_counter() - started
        return LogProbsReply(
            log_probs=None if log_probs is None else Array.of(log_probs, "float32"),
            entropy=None if entropy is None else Array.of(entropy, "float32"),
            ref_log_probs=None if ref_log_probs is None else Array.of(ref_log_probs, "float32"),
            metrics=metrics | memory_metrics(self.ranks),
        )

    def update(self, request: UpdateRequest) -> UpdateReply:
        sequences = _sequences(request.batch)
        try:
            self.updater.check(sequences)
        except DataError as error:
            raise OperationRefused(error) from error
        metrics = self.updater.update(sequences, request.step, request.total_steps)
        return UpdateReply(metrics=metrics | self.turns.metrics())

    def publish(self, request: PublishRequest) -> PublishReply:
        with self.turns.handing_over(self.optimizer):
            return self.publisher.publish(self.model, request, self.state.updates)

    def save_status(self, wait_seconds: float) -> SaveStatusReply:
        """Not collective: any thread may ask at any time."""
        return self.shards.status(wait_seconds)

    def load(self, request: LoadRequest) -> LoadReply:
        restored = self.shards.load(Path(request.directory))
        self.state.step, self.state.updates = restored.step, restored.updates
        self.state.skipped_updates = restored.skipped_updates
        return LoadReply(step=self.state.step)

    def close(self) -> None:
        """Let a checkpoint that is being written finish, then free ports and threads."""
        self.shards.status(self.options.spec.trainer.process_group_timeout_seconds)
        if self.weights is not None:
            self.weights.close()
        if self.store is not None:
            self.store.close()


def _sequences(batch: TrainBatch) -> Sequences:
    try:
        return Sequences.of(batch)
    except DataError as error:
        raise OperationRefused(error) from error
