"""The weight-sync service: which version the job is at, and which engines serve it.

Invariant: an engine gets prompts only after this coordinator made it apply the current version and the engine's workers read the same
version and digest back. A restarted engine, a restarted coordinator and an engine whose sync failed all go the same way in.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import msgspec

from grpo_worker.coordinator.members import Member, Members
from grpo_worker.coordinator.trainer_client import TrainerClient
from grpo_worker.errors import ConfigError, PeerLostError
from grpo_worker.metric_loggers.events import Level
from grpo_worker.protocol import codec
from grpo_worker.protocol.auth import authorization
from grpo_worker.protocol.messages import (
    ApplyWeightsReply,
    ApplyWeightsRequest,
    ErrorReply,
    PublishReply,
    PublishRequest,
    StoreSource,
)

Emit = Callable[[Level, str, str], None]
RETRY_SECONDS = 1.0
MISMATCH = "WeightsMismatch"  # the tensors do not fit the engine's model: trying again cannot help


@dataclass
class SyncReport:
    """One version on its way to all engines."""

    version: int
    publish_seconds: float
    total_seconds: float = 0.0
    replies: list[ApplyWeightsReply] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        numbers = {"weight_sync/publish_seconds": self.publish_seconds, "weight_sync/engines": float(len(self.replies))}
        if self.replies:
            numbers |= {
                "weight_sync/bytes": float(sum(reply.bytes for reply in self.replies)),
                "weight_sync/pull_seconds": max(reply.pull_seconds for reply in self.replies),
                "weight_sync/apply_seconds": max(reply.apply_seconds for reply in self.replies),
                "weight_sync/pause_seconds": max(reply.pause_seconds for reply in self.replies),
                "weight_sync/bytes_per_second": statistics.fmean(
                    reply.bytes / reply.pull_seconds for reply in self.replies if reply.pull_seconds > 0
                )
                if any(reply.pull_seconds > 0 for reply in self.replies)
                else 0.0,
            }
        return numbers


class WeightSync:
    """Publishes versions, applies them to engines, and brings engines that join into service."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        members: Members,
        trainer: TrainerClient,
        token: str,
        timeout_seconds: float,
        emit: Emit,
    ) -> None:
        self._session = session
        self._members = members
        self._trainer = trainer
        self._headers = {**authorization(token), "Content-Type": codec.CONTENT_TYPE}
        self._timeout_seconds = timeout_seconds
        self._emit = emit
        self._source: StoreSource | None = None
        self._applied: dict[str, tuple[str, int]] = {}  # member name -> (instance, version), as read back
        self._busy: dict[str, asyncio.Lock] = {}
        self._publishing = False

    @property
    def version(self) -> int | None:
        """The newest published version."""
        return self._source.version if self._source else None

    def in_service(self) -> list[Member]:
        """Engines that serve the current version (read back), alive, by name."""
        return [
            m for m in self._members.alive("rollout") if self._applied.get(m.name) == (m.beat.instance, self.version)
        ]

    def served_version(self, name: str) -> int | None:
        applied = self._applied.get(name)
        return applied[1] if applied else None

    async def publish(self, version: int) -> SyncReport:
        """Publish `version` and apply it to every living engine. Engines that fail leave service and are tried again by `join`.

        Raises TrainerLost, TrainerFailed.
        """
        started = time.monotonic()
        self._publishing = True  # `join_forever` leaves the engines to us
        try:
            reply = await self._trainer.call(PublishRequest(version=version), PublishReply)
            self._source = reply.store
            report = SyncReport(version, reply.seconds)
            engines = self._members.alive("rollout")
            results = await asyncio.gather(*(self._apply(member) for member in engines), return_exceptions=True)
        finally:
            self._publishing = False
        for result in results:
            if isinstance(result, ApplyWeightsReply):
                report.replies.append(result)
            elif isinstance(result, PeerLostError):
                self._emit("warning", "WeightSyncFailed", str(result))
            elif isinstance(result, BaseException):
                raise result
        report.total_seconds = time.monotonic() - started
        self._members.notify()
        return report

    async def join_forever(self) -> None:
        """Bring engines that are alive but not in service in; runs beside the training loop."""
        while True:
            if self._source is not None and not self._publishing:
                waiting = [m for m in self._members.alive("rollout") if m not in self.in_service()]
                for result in await asyncio.gather(*(self._join(member) for member in waiting), return_exceptions=True):
                    if isinstance(result, BaseException) and not isinstance(result, PeerLostError):
                        raise result
            await self._members.wait(RETRY_SECONDS)

    async def wait_in_service(self, count: int, timeout_seconds: float) -> list[Member]:
        """Until `count` engines serve the current version. Raises PeerLostError that names who is missing."""
        deadline = time.monotonic() + timeout_seconds
        while len(serving := self.in_service()) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                known = ", ".join(
                    f"{m.name} ({m.beat.state}, silent {self._members.silent_for(m):.0f} s)"
                    for m in self._members.all()
                    if m.beat.role == "rollout"
                )
                raise PeerLostError(
                    f"{len(serving)} of {count} rollout servers serve weights of version {self.version} after {timeout_seconds:.0f} s "
                    f"(known: {known or 'none'}). See their logs; failurePolicy.startupTimeoutSeconds is the limit."
                )
            await self._members.wait(min(left, RETRY_SECONDS))
        return serving

    async def _join(self, member: Member) -> None:
        try:
            reply = await self._apply(member)
        except PeerLostError as error:
            self._emit("warning", "WeightSyncFailed", str(error))
            raise
        self._emit("info", "RolloutJoined", f"{member.name} serves weights of version {reply.version}")
        self._members.notify()

    async def _apply(self, member: Member) -> ApplyWeightsReply:
        """Apply the current version to one engine and check what its workers read back. Raises PeerLostError naming it."""
        source = self._source
        assert source is not None
        async with self._busy.setdefault(member.name, asyncio.Lock()):
            if self._applied.get(member.name) == (member.beat.instance, source.version) and source is self._source:
                return ApplyWeightsReply(
                    version=source.version,
                    digest=source.digest,
                    bytes=0,
                    pull_seconds=0.0,
                    apply_seconds=0.0,
                    pause_seconds=0.0,
                    total_seconds=0.0,
                )
            self._applied.pop(member.name, None)
            request = ApplyWeightsRequest(version=source.version, store=source, timeout_seconds=self._timeout_seconds)
            reply = await self._post(member, request)
            if (reply.version, reply.digest) != (source.version, source.digest):
                raise PeerLostError(
                    f"{member.name} answered the sync of version {source.version} with version {reply.version}, digest {reply.digest[:16]} "
                    f"in place of {source.digest[:16]}: it is kept out of service"
                )
            self._applied[member.name] = (member.beat.instance, source.version)
            return reply

    async def _post(self, member: Member, request: ApplyWeightsRequest) -> ApplyWeightsReply:
        timeout = aiohttp.ClientTimeout(total=self._timeout_seconds + 10.0, sock_connect=10.0)
        try:
            async with self._session.post(
                f"{member.url}/v1/weights", data=codec.encode(request), headers=self._headers, timeout=timeout
            ) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._members.suspect(member.name)
            raise PeerLostError(
                f"{member.name} at {member.url} was lost during the sync of version {request.version}: {error or type(error).__name__}"
            ) from error
        try:
            if response.status >= 400:
                refusal: ErrorReply = codec.decode(body, ErrorReply)
                message = f"{member.name} refused version {request.version}: {refusal.message}"
                if refusal.reason == MISMATCH:
                    raise ConfigError(
                        f"{message}. Trainer and engine do not load the same model: check model.path on both sides."
                    )
                raise PeerLostError(message)
            return codec.decode(body, ApplyWeightsReply)
        except msgspec.DecodeError as error:
            raise PeerLostError(
                f"{member.name} answered the sync with something else (status {response.status})"
            ) from error
