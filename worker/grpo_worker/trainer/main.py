"""`grpo-worker trainer`: from a job to a running trainer.

Invariant: this module alone knows both the job's document and the trainer's options; everything below knows only the
latter.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from grpo_worker.environment import ADVERTISED_HOST, COORDINATOR_URL, LISTEN_HOST, MEMBER_NAME
from grpo_worker.protocol.auth import job_token
from grpo_worker.trainer.launch import is_rank_process, placement, run_ranks
from grpo_worker.trainer.options import LossOptions, OptimizerOptions, TrainerOptions

if TYPE_CHECKING:
    from grpo_worker.config.job import GRPOJob

DEFAULT_MAX_TOKENS = 16384
LOOPBACK = "127.0.0.1"

log = logging.getLogger(__name__)


def run(job: "GRPOJob") -> int:
    """Be this node's part of the trainer: its only rank, or the supervisor of its ranks. Returns the exit code.

    Raises GRPOError for what went wrong in this process.
    """
    trainer, environment = job.spec.trainer, os.environ
    if trainer.nodes * trainer.gpus_per_node > 1 and not is_rank_process(environment):
        place = placement(trainer.nodes, trainer.gpus_per_node, job.spec.network.rendezvous_port, environment)
        return run_ranks([sys.executable, *sys.orig_argv[1:]], place)
    run_rank(options_of(job, environment, _device(job)))
    return 0


def run_rank(options: TrainerOptions) -> None:
    """One rank, from the rendezvous to the coordinator's stop. Raises GRPOError."""
    from grpo_worker.trainer import loop
    from grpo_worker.trainer.distributed import join, leave
    from grpo_worker.trainer.engine import TrainerEngine
    from grpo_worker.trainer.server import TrainerServer

    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    token = job_token()
    ranks = join(options.device, options.collective_timeout_seconds, options.seed, options.rendezvous_timeout_seconds)
    if not ranks.is_first:
        loop.tell_when_terminated(ranks, options.name, terminated)
        engine = TrainerEngine(options, ranks, token)
        loop.follow(engine)
        engine.close()
        leave()
        return
    holder: list[TrainerEngine] = []
    server = TrainerServer(options, token, lambda wait_seconds: holder[0].save_status(wait_seconds), terminated)
    server.start()
    loop.watch_other_ranks(server, ranks)
    try:
        engine = TrainerEngine(options, ranks, token)
        holder.append(engine)
        log.info("trainer: %d ranks on %s, %s at %s", ranks.world_size, options.device, options.model_path, server.url)
        server.ready()
        loop.lead(engine, server, options, terminated)
        engine.close()
    finally:
        server.close()
    leave()


def options_of(job: "GRPOJob", environment: Mapping[str, str], device: str) -> TrainerOptions:
    """The trainer's view of a job. `device` is the resolved one, cuda or cpu."""
    spec = job.spec
    actor, optim, network = spec.actor, spec.actor.optim, spec.network
    return TrainerOptions(
        model_path=spec.model.path,
        model_revision=spec.model.revision,
        device=device,  # type: ignore[arg-type]
        dtype=None if spec.model.dtype == "auto" else spec.model.dtype,
        seed=spec.trainer.seed,
        temperature=spec.rollout.temperature,
        max_prompt_tokens=spec.data.max_prompt_length,
        max_response_tokens=spec.data.max_response_length,
        use_remove_padding=spec.model.use_remove_padding,
        gradient_checkpointing=spec.model.enable_gradient_checkpointing,
        compile_layers=spec.model.compile,
        param_offload=actor.fsdp.param_offload,
        optimizer_offload=actor.fsdp.optimizer_offload,
        head_chunk_tokens=spec.model.head_chunk_size,
        reference=actor.use_kl_loss or spec.algorithm.use_kl_in_reward,
        ref_param_offload=spec.ref.fsdp.param_offload,
        max_token_len_per_gpu=actor.ppo_max_token_len_per_gpu or DEFAULT_MAX_TOKENS,
        micro_batch_size_per_gpu=actor.ppo_micro_batch_size_per_gpu,
        log_prob_max_token_len_per_gpu=spec.rollout.log_prob_max_token_len_per_gpu,
        log_prob_micro_batch_size_per_gpu=spec.rollout.log_prob_micro_batch_size_per_gpu,
        ref_log_prob_max_token_len_per_gpu=spec.ref.log_prob_max_token_len_per_gpu,
        ref_log_prob_micro_batch_size_per_gpu=spec.ref.log_prob_micro_batch_size_per_gpu,
        ppo_epochs=actor.ppo_epochs,
        updates_per_step=actor.updates_per_step(spec.data.train_batch_size),
        optimizer=OptimizerOptions(
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            grad_clip=optim.clip_grad,
            schedule=optim.lr_scheduler,
            warmup_updates=optim.lr_warmup_steps,
            min_lr_ratio=optim.min_lr_ratio,
        ),
        loss=LossOptions(
            loss_mode=actor.loss_mode,
            loss_agg_mode=actor.loss_agg_mode,
            clip_ratio_low=actor.clip_ratio_low,
            clip_ratio_high=actor.clip_ratio_high,
            clip_ratio_c=actor.clip_ratio_c,
            use_kl_loss=actor.use_kl_loss,
            kl_loss_coef=actor.kl_loss_coef,
            kl_loss_type=actor.kl_loss_type,
            entropy_coeff=actor.entropy_coeff,
        ),
        rollout_dtype=None if spec.rollout.dtype == "auto" else spec.rollout.dtype,
        host=environment.get(LISTEN_HOST, LOOPBACK),
        port=network.trainer_port,
        advertised_host=environment.get(ADVERTISED_HOST, LOOPBACK),
        weight_port=network.weight_sync_port,
        coordinator_url=environment.get(COORDINATOR_URL, ""),
        name=environment.get(MEMBER_NAME, "trainer-0"),
        heartbeat_seconds=network.heartbeat_seconds,
        rendezvous_timeout_seconds=spec.failure_policy.startup_timeout_seconds,
        collective_timeout_seconds=spec.trainer.process_group_timeout_seconds,
        operation_timeout_seconds=network.request_timeout_seconds,
    )


def _device(job: "GRPOJob") -> str:
    if job.spec.runtime.device != "auto":
        return job.spec.runtime.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
