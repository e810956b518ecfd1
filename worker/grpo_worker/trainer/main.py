"""`grpo-worker trainer`: from a job to a running trainer.

Invariant: a process is this node's only rank, one of its ranks, or the supervisor that starts them; a supervisor never
touches a device.
"""

import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from grpo_worker.protocol.auth import job_token
from grpo_worker.trainer.launch import is_rank_process, placement, run_ranks

if TYPE_CHECKING:
    from grpo_worker.config.job import GRPOJob
    from grpo_worker.trainer.options import TrainerOptions

log = logging.getLogger(__name__)


def run(job: "GRPOJob") -> int:
    """Be this node's part of the trainer: its only rank, or the supervisor of its ranks. Returns the exit code.

    Raises GRPOError for what went wrong in this process.
    """
    trainer, environment = job.spec.trainer, os.environ
    if trainer.nodes * trainer.gpus_per_node > 1 and not is_rank_process(environment):
        place = placement(trainer.nodes, trainer.gpus_per_node, job.spec.network.rendezvous_port, environment)
        return run_ranks([sys.executable, *sys.orig_argv[1:]], place)
    from grpo_worker.trainer.options import TrainerOptions

    run_rank(TrainerOptions.of(job.spec, environment))
    return 0


def run_rank(options: "TrainerOptions") -> None:
    """One rank, from the rendezvous to the coordinator's stop. Raises GRPOError."""
    from grpo_worker.trainer import loop
    from grpo_worker.trainer.distributed import join, leave
    from grpo_worker.trainer.server import TrainerServer

    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    token = job_token()
    trainer, startup_seconds = options.spec.trainer, options.spec.failure_policy.startup_timeout_seconds
    shard_size = options.spec.actor.fsdp.shard_size
    ranks = join(options.device, trainer.process_group_timeout_seconds, trainer.seed, startup_seconds, shard_size)
    if not ranks.is_first:
        loop.tell_when_terminated(ranks, options.name, terminated)
        engine = loop.load(options, ranks, token)
        loop.follow(engine)
        engine.close()
        leave()
        return
    holder: list[loop.TrainerEngine] = []
    server = TrainerServer(options, token, lambda wait_seconds: holder[0].save_status(wait_seconds), terminated)
    server.start()
    loop.watch_other_ranks(server, ranks)
    try:
        engine = loop.load(options, ranks, token)
        holder.append(engine)
        model = options.spec.model.path
        log.info("trainer: %d ranks on %s, %s at %s", ranks.world_size, options.device, model, server.url)
        server.ready()
        loop.lead(engine, server, options, terminated)
        engine.close()
    finally:
        server.close()
    leave()
