"""The replica's membership: it tells the coordinator what it serves, and learns what it should serve.

Invariant: a replica is ready only while its engine is healthy, the coordinator has answered recently, and its weight
version is within [policy_version - max_staleness, policy_version] of this coordinator's incarnation. Versions of
another incarnation do not count.
"""

import asyncio
import logging
import uuid
from dataclasses import dataclass
from typing import Literal

from grpo_worker.config.run import Network
from grpo_worker.errors import RetryableError
from grpo_worker.protocol.heartbeat import HeartbeatClient
from grpo_worker.protocol.messages import Heartbeat, HeartbeatReply
from grpo_worker.rollout.engine import RolloutEngine

FAREWELL_SECONDS = 2.0
LEAST_GIVE_UP_SECONDS = 600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaOptions:
    """One replica's place in the job."""

    name: str  # stable over restarts, e.g. "rollout-0"
    coordinator_url: str
    network: Network
    token: str = ""
    host: str = "127.0.0.1"  # that the server binds
    port: int = 0  # 0: any free one
    advertised_host: str = "127.0.0.1"  # under which the others reach it

    @property
    def give_up_seconds(self) -> float:
        """Without an answer of the coordinator for so long the process ends, to be started again."""
        return max(LEAST_GIVE_UP_SECONDS, 10 * self.network.member_timeout_seconds)


def unready_reason(
    *,
    engine_problem: str,
    weight_version: int | None,
    reply: HeartbeatReply | None,
    reply_age_seconds: float,
    lost_after_seconds: float,
) -> str:
    """Why the replica must not serve now; '' when it may."""
    if engine_problem:
        return engine_problem
    if reply is None:
        return "the coordinator has not answered yet"
    if reply_age_seconds > lost_after_seconds:
        return f"the coordinator has not answered for {reply_age_seconds:.0f} s (limit {lost_after_seconds:.0f} s)"
    if reply.policy_version is None:
        return "the coordinator has no policy version yet"
    if weight_version is None:
        return f"no weights were applied yet; policy version {reply.policy_version} is current"
    oldest = reply.policy_version - reply.max_staleness
    if not oldest <= weight_version <= reply.policy_version:
        return f"weight version {weight_version} is outside [{oldest}, {reply.policy_version}]"
    return ""


class Membership:
    """Sends heartbeats until it is told to stop."""

    def __init__(self, options: ReplicaOptions, port: int, engine: RolloutEngine) -> None:
        self._options, self._engine = options, engine
        self._url = f"http://{options.advertised_host}:{port}"
        self._instance = uuid.uuid4().hex  # new for each process start
        self.state: Literal["starting", "ready", "failed"] = "starting"
        self._incarnation: str | None = None
        self._leaving = False
        self.may_load = asyncio.Event()  # a colocated engine waits for it
        self._stopped = asyncio.Event()
        self._client = HeartbeatClient(
            options.coordinator_url, options.token, options.network.heartbeat_seconds, self._beat, self._learn
        )

    def unready_reason(self) -> str:
        problem = self._engine.broken or ("the engine is dead" if self._engine.dead else "")
        if self.state == "starting":
            held = self._client.reply is not None and self._client.reply.hold
            problem = (
                "the trainer has the devices: the engine loads afterwards"
                if held
                else "the engine is loading the model"
            )
        return unready_reason(
            engine_problem=problem,
            weight_version=self._engine.weight_version,
            reply=self._client.reply,
            reply_age_seconds=self._client.silent_seconds,
            lost_after_seconds=self._options.network.member_timeout_seconds,
        )

    async def run(self) -> None:
        """Returns when the coordinator says that the job is over.

        Raises:
            RetryableError: no answer within `give_up_seconds`.
        """
        beating, stopped = asyncio.create_task(self._client.run()), asyncio.create_task(self._stopped.wait())
        try:
            while not self._stopped.is_set():
                if (silent := self._client.silent_seconds) > self._options.give_up_seconds:
                    raise RetryableError(
                        f"the coordinator at {self._options.coordinator_url} has not answered for {silent:.0f} s "
                        f"(limit {self._options.give_up_seconds:.0f} s)"
                    )
                await asyncio.wait({beating, stopped}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                if beating.done():
                    beating.result()
        finally:
            beating.cancel()
            stopped.cancel()

    async def leave(self) -> None:
        """Tell the coordinator that this process was told to end, so that it sends nothing more here."""
        if not self._stopped.is_set():
            self._leaving, self.state = True, "failed"
            await self._client.say(FAREWELL_SECONDS)

    def _beat(self) -> Heartbeat:
        return Heartbeat(
            role="rollout",
            name=self._options.name,
            instance=self._instance,
            url=self._url,
            state=self.state,
            weight_version=self._engine.weight_version,
            weight_digest=self._engine.weight_digest,
            message="told to end" if self._leaving else self._engine.broken,
            terminating=self._options.name if self._leaving else "",
            stats=self._engine.stats() if self.state != "starting" else {},
        )

    def _learn(self, reply: HeartbeatReply) -> None:
        if self._incarnation not in (None, reply.incarnation):
            log.info("the coordinator has started again: weight version %s counts no more", self._engine.weight_version)
            self._engine.forget_version()
        self._incarnation = reply.incarnation
        if not reply.hold:
            self.may_load.set()
        if reply.stop:
            self._stopped.set()
