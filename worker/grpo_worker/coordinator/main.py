"""The coordinator process: server and signals around the training loop, and a last word that a supervisor understands.

Invariant: whatever ends the run, the living members are told, or the error says what happened and how far the run got.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import time

import aiohttp

from grpo_worker.config import GRPOJob
from grpo_worker.coordinator.app import make_app, serve
from grpo_worker.coordinator.build import Outside, build
from grpo_worker.coordinator.loop import TrainingLoop
from grpo_worker.coordinator.member_client import MemberClient
from grpo_worker.coordinator.members import Members
from grpo_worker.coordinator.progress import Progress
from grpo_worker.coordinator.spans import Spans
from grpo_worker.coordinator.timing import StartupTimer
from grpo_worker.coordinator.trainer_client import TrainerClient
from grpo_worker.coordinator.weight_sync import WeightSync
from grpo_worker.environment import COORDINATOR_PORT, LISTEN_HOST
from grpo_worker.errors import GRPOError, YieldedError
from grpo_worker.metric_loggers import EventLog
from grpo_worker.protocol.auth import job_token
from grpo_worker.protocol.messages import Heartbeat, HeartbeatReply
from grpo_worker.run_directory import RunDirectory


def run(job: GRPOJob) -> dict[str, object]:
    """Run the coordinator to its end; what its last word tells. Raises GRPOError."""
    return asyncio.run(Coordinator(job).run())


class Coordinator:
    """One life of the coordinator. `incarnation` tells its versions from those of an earlier life."""

    def __init__(self, job: GRPOJob) -> None:
        self._job = job
        self._spec = job.spec
        self._token = job_token()
        self._directory = RunDirectory.of_environment(job.name)
        self._events = EventLog(self._directory.events, "coordinator", background=True)
        network = job.spec.network
        self._members = Members(
            network.member_timeout_seconds, time.monotonic, self._events.emit, network.heartbeat_seconds
        )
        self._incarnation = secrets.token_hex(4)
        self._loop: TrainingLoop | None = None
        self._startup: asyncio.Task[TrainingLoop] | None = None
        self._startup_timer = StartupTimer()
        self._stop_reason = ""
        self._stopping = False
        self._told: set[str] = set()

    async def run(self) -> dict[str, object]:
        """Returns how far the run got (`Progress.last_word`). Raises GRPOError, with the same as its context."""
        network = self._spec.network
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20) as session:
            spans = Spans()
            client = MemberClient(session, self._members, self._token, spans)
            self._trainer = TrainerClient(client, self._members, network.request_timeout_seconds)
            self._weights = WeightSync(
                client,
                self._members,
                self._trainer,
                network.weight_sync_timeout_seconds,
                self._events.emit,
                clear_cache=self._spec.rollout.clears_kv_cache,
                transport=self._spec.weight_transport,
                workers_of_an_engine=self._spec.rollout.tensor_parallel_size,
                patience_seconds=network.member_timeout_seconds,
                startup_seconds=self._spec.failure_policy.startup_timeout_seconds,
            )
            self._progress = Progress(
                self._job.name,
                self._spec,
                self._incarnation,
                self._members,
                self._weights,
                {
                    "run": self._directory.root,
                    "checkpoints": self._directory.checkpoints(self._spec.checkpoint.path),
                },
            )
            outside = Outside(
                client,
                self._members,
                self._trainer,
                self._weights,
                self._directory,
                self._events,
                self._progress,
                spans,
            )
            app = make_app(self._token, self._members, self._progress, self._reply, self._stop)
            port = int(os.environ.get(COORDINATOR_PORT) or network.coordinator_port)
            server = await serve(app, os.environ.get(LISTEN_HOST, "127.0.0.1"), port)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._stop, number.name)
            try:
                await self._train(outside)
                await self._say_farewell()
                return self._progress.last_word()
            except GRPOError as error:
                yielded = isinstance(error, YieldedError)
                if not yielded:
                    self._progress.set("Failed", str(error))
                self._events.emit("info" if yielded else "error", error.reason, str(error))
                if yielded:
                    await self._say_farewell()
                error.context = self._progress.last_word()
                raise
            finally:
                await server.cleanup()
                await asyncio.to_thread(self._events.close)

    async def _train(self, outside: Outside) -> None:
        async with contextlib.AsyncExitStack() as stack:
            self._startup = asyncio.create_task(build(self._job, outside, stack, self._startup_timer))
            try:
                self._loop = loop = await self._startup
            except asyncio.CancelledError:
                if self._stop_reason:
                    raise YieldedError(f"stopped before the first step ({self._stop_reason})") from None
                raise
            if self._stop_reason:
                loop.stop(self._stop_reason)
            await loop.run()

    def _reply(self, beat: Heartbeat) -> HeartbeatReply:
        if self._stopping:
            self._told.add(beat.name)
        elif (
            beat.terminating and beat.role == "trainer" and not self._stop_reason
        ):  # an eviction: what it holds is saved while it still lives
            self._stop(f"{beat.terminating} is being terminated")
        return HeartbeatReply(
            incarnation=self._incarnation,
            policy_version=self._weights.version,
            max_staleness=self._spec.rollout.max_staleness,
            stop=self._stopping,
            hold=self._spec.colocated and beat.role == "rollout" and not self._weights.may_load(beat),
        )

    def _stop(self, reason: str) -> None:
        """A signal or a request: end after the step under way; a start is broken off."""
        self._stop_reason = self._stop_reason or reason
        if self._loop is not None:
            self._loop.stop(reason)
        elif self._startup is not None:
            self._startup.cancel()

    async def _say_farewell(self) -> None:
        """Tell every living process, with the answer to its next heartbeat, that the run is over."""
        self._stopping = True
        if stopped := await self._trainer.stop():
            self._told.add(stopped)
        limit = time.monotonic() + 3 * self._spec.network.heartbeat_seconds + 1.0
        while time.monotonic() < limit:
            if all(member.name in self._told for member in self._members.present()):
                return
            await asyncio.sleep(0.05)
