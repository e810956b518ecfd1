"""The rollout process: port, heartbeats and engine come up, and one of them ends it.

Invariant: it ends with 0 when it is told to stop (signal, or the coordinator's word), else with a `GRPOError` that says
why. The port is bound before the model is loaded, so a clash costs seconds, not minutes.
"""

import asyncio
import errno
import logging
import os
import signal
from typing import TYPE_CHECKING

from grpo_worker.concurrency import first_to_end
from grpo_worker.environment import ADVERTISED_HOST, COORDINATOR_URL, LISTEN_HOST, MEMBER_NAME, ROLLOUT_PORT
from grpo_worker.errors import ConfigError
from grpo_worker.protocol import auth
from grpo_worker.rollout.engine import RolloutEngine
from grpo_worker.rollout.heartbeat import Membership, ReplicaOptions
from grpo_worker.rollout.options import EngineOptions
from grpo_worker.rollout.server import RolloutServer, listen

if TYPE_CHECKING:
    from grpo_worker.config.job import GRPOJob

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5


def run(job: "GRPOJob", *, index: int) -> None:
    """Serve replica `index` of a job until it is told to stop. Raises GRPOError."""
    engine, replica = options_of(job, index)
    asyncio.run(serve(engine, replica))


def options_of(job: "GRPOJob", index: int) -> tuple[EngineOptions, ReplicaOptions]:
    """From the document, and from what the supervisor says in the environment."""
    spec, network, token = job.spec, job.spec.network, auth.job_token()
    max_model_len = spec.rollout.context_tokens(spec.data.max_prompt_length, spec.data.max_response_length)
    replica = ReplicaOptions(
        name=os.environ.get(MEMBER_NAME, f"rollout-{index}"),
        coordinator_url=os.environ.get(COORDINATOR_URL, f"http://127.0.0.1:{network.coordinator_port}"),
        network=network,
        token=token,
        host=os.environ.get(LISTEN_HOST, "127.0.0.1"),
        port=int(os.environ.get(ROLLOUT_PORT) or (network.rollout_port and network.rollout_port + index)),
        advertised_host=os.environ.get(ADVERTISED_HOST, "127.0.0.1"),
    )
    shared = spec if spec.colocated else None
    return EngineOptions(spec.model, spec.rollout, max_model_len, network, token, shared), replica


async def serve(options: EngineOptions, replica: ReplicaOptions) -> None:
    """Raises GRPOError; returns when told to stop."""
    engine = RolloutEngine(options)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    membership: Membership | None = None
    server = RolloutServer(
        engine, token=replica.token, unready_reason=lambda: membership.unready_reason() if membership else "starting"
    )
    try:
        runner, port = await listen(server.app(), replica.host, replica.port, replica.network.member_timeout_seconds)
    except OSError as error:
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error.strerror})"
        raise ConfigError(
            f"network.rolloutPort: port {replica.port} of {replica.host} {what}. Free it, or set another (0: any free one)."
        ) from error
    membership = Membership(replica, port, engine)
    log.info("%s listens on http://%s:%d", replica.name, replica.host, port)

    async def start_and_watch() -> None:
        if options.colocated:
            await membership.may_load.wait()
        await engine.start()
        server.started = True
        membership.state = "ready"
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if engine.dead:
                membership.state = "failed"
                engine.check_health()

    try:
        await first_to_end(start_and_watch(), membership.run(), stop.wait())
        if stop.is_set():
            await membership.leave()
    finally:
        await runner.cleanup()
        engine.shutdown()
