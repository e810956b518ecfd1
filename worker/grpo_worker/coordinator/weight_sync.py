"""The weight-sync service: which version the job is at, and which engines serve it.

Invariant: an engine gets prompts only after this coordinator made it apply the current version and the engine's workers read the same
version and digest back. A restarted engine, a restarted coordinator and an engine whose sync failed all go the same way in, beside
training, by the store: a version is settled when the engines that were in service have it or were lost. One version is on its way at a time.

With `nccl` and `ipc` (chosen, or by `auto` for what is seen of the devices) a version goes to the engines in service at once, over a group that lasts until its members change or one of them fails. The
store gets it when somebody needs it there: at the first publish, when an engine is about to join, and afterwards while the trainer still has it.

Colocated engines sleep from `rest` on until the next `publish`. Nobody joins meanwhile, and no process of an engine takes memory.
"""

import asyncio
import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from grpo_worker.config.run import Transport
from grpo_worker.coordinator.member_client import MemberClient
from grpo_worker.coordinator.members import Emit, Member, Members
from grpo_worker.coordinator.trainer_client import TrainerClient, TrainerFailed
from grpo_worker.errors import ConfigError, PeerLostError
from grpo_worker.protocol.http import RefusedError
from grpo_worker.protocol.messages import (
    ApplyWeightsReply,
    ApplyWeightsRequest,
    GroupPlace,
    Heartbeat,
    PublishReply,
    PublishRequest,
    SleepReply,
    SleepRequest,
    StoreSource,
)
from grpo_worker.weightsync.channels import CPU, SENDER

RETRY_SECONDS = 1.0  # before a sync is tried again; doubles
MAX_RETRY_SECONDS = 30.0
ANSWER_SECONDS = 10.0  # that an engine has, after the limit, to say itself what went wrong
GIB = 1 << 30
MISMATCH = "WeightsMismatch"  # the tensors do not fit the engine's model: trying again cannot help


MAX_GROUP_FAILURES = 3  # in a row, for every engine: then the store it is
NOT_HELD = "VersionNotHeld"  # the trainer's weights have changed since


@dataclass
class Group:
    """Members of a group beside the trainer, in the order of their ranks."""

    generation: int
    engines: list[Member]


@dataclass
class SyncReport:
    """One version on its way to all engines."""

    version: int
    publish_seconds: float
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
        client: MemberClient,
        members: Members,
        trainer: TrainerClient,
        timeout_seconds: float,
        emit: Emit,
        *,
        clear_cache: bool = True,
        transport: Transport = "store",
        workers_of_an_engine: int = 1,
        patience_seconds: float = 30.0,
        startup_seconds: float = 1800.0,
    ) -> None:
        """
        Args:
            clear_cache: requests that run during a swap lose their KV cache, and it is computed again.
            transport: with `ipc` groups are pairs of a trainer rank and the worker on its device, with `nccl` there is one for all; `auto` is
                `nccl` for as long as no two of the group's processes have the same device, `store` otherwise.
            workers_of_an_engine: its members of a group.
            patience_seconds: of a group's member for another one.
            startup_seconds: that an engine may need to start.
        """
        self._client = client
        self._members = members
        self._trainer = trainer
        self._timeout_seconds = timeout_seconds
        self._emit = emit
        self._clear_cache = clear_cache
        self._transport = transport
        self._pairs = transport == "ipc"
        self._workers = workers_of_an_engine
        self._patience_seconds = patience_seconds
        self._startup_seconds = startup_seconds
        self._resting: list[Member] | None = None  # engines in service that sleep; None: nobody has to
        self._let_in: set[str] = set()  # instances of engines that may take memory, or have it
        self._version: int | None = None
        self._source: StoreSource | None = None  # of that version, or of an older one
        self._meeting_port = 0
        self._trainer_device = CPU  # of rank 0
        self._group: Group | None = None
        self._group_failures = 0
        self._generations = itertools.count(1)
        self._storing = asyncio.Lock()
        self._applying: asyncio.Task[SyncReport] | None = (
            None  # the newest version's way to the engines that were in service
        )
        self._publishing: list[Member] = []  # those; `join_forever` leaves them alone

    @property
    def version(self) -> int | None:
        """The newest published version."""
        return self._version

    def in_service(self) -> list[Member]:
        """Engines that serve the current version (read back), alive, by name."""
        version = self.version
        return [m for m in self._members.alive("rollout") if version is not None and m.served == version]

    def doubt(self, member: Member) -> None:
        """It does not serve what it had read back: out of service until its next sync."""
        member.served = None
        self._members.notify()

    def may_load(self, beat: Heartbeat) -> bool:
        """Whether the engine that says it is alive may take memory. Who may once may always: `rest` waits for it."""
        if self._resting is None:
            self._let_in.add(beat.instance)
        return beat.instance in self._let_in

    async def rest(self) -> dict[str, float]:
        """The trainer's turn, for colocated engines: they give their devices' memory back, those that start have it first.
        One that does not is told of; it is lost, or the trainer will find no memory. Returns metrics.
        """
        deadline = time.monotonic() + self._startup_seconds
        self._resting = self.in_service()
        while any(
            member.beat.role == "rollout" and member.beat.state == "starting" and member.beat.instance in self._let_in
            for member in self._members.present()
        ):
            if (left := deadline - time.monotonic()) <= 0:
                break
            with self._members.waiting("engines that have begun to start, before the trainer has the devices"):
                await self._members.wait(min(left, RETRY_SECONDS))
        engines = self._members.alive("rollout")
        asleep = await asyncio.gather(*map(self._put_to_sleep, engines))
        sleeping = {member: reply for member, reply in zip(engines, asleep, strict=True) if reply is not None}
        self._resting = [member for member in sleeping if member in self._resting]
        used = max((reply.device_bytes for reply in sleeping.values()), default=0)
        return {"memory/generating_measured_gib": used / GIB} if used else {}

    async def _put_to_sleep(self, member: Member) -> SleepReply | None:
        request, limit = SleepRequest(timeout_seconds=self._timeout_seconds), self._timeout_seconds + ANSWER_SECONDS
        try:
            reply: SleepReply = await self._client.ask(
                member, "/v1/sleep", request, SleepReply, limit, "its turn to sleep"
            )
        except PeerLostError as error:
            self.doubt(member)
            self._emit("warning", "EngineAwake", f"{error}. Its memory may be missing to the trainer.")
            return None
        return reply

    async def publish(self, version: int) -> None:
        """The trainer's weights become `version`, and every engine in service (at first: alive) begins to take it, beside what follows.
        Those that fail leave service, and join again. Waits for the version before.

        Raises TrainerLost, TrainerFailed, ConfigError.
        """
        if self._applying is not None:
            await self.settled()
        first = self._version is None
        engines = self._members.alive("rollout") if first else self.in_service()
        if self._resting is not None:
            engines = [member for member in self._resting if self._members.lives(member)]
        joining = [member for member in self._members.alive("rollout") if member not in engines]
        group = None if first or not engines else self._group_of(engines)
        if group is None:
            with self._members.waiting(f"the trainer to publish the weights of version {version}"):
                reply = await self._trainer.call(PublishRequest(version=version), PublishReply)
            self._version, self._source = version, reply.store
            self._meeting_port, self._trainer_device = reply.meeting_port, reply.device
            self._publishing = engines
            self._resting = None
            self._applying = asyncio.create_task(self._apply_to(engines, SyncReport(version, reply.seconds)))
            return
        place = self._senders_place(group)
        self._version, self._publishing, self._resting = version, engines, None
        sent: asyncio.Future[PublishReply] = asyncio.get_running_loop().create_future()
        self._applying = asyncio.create_task(self._broadcast_to(group, version, sent))
        try:
            with self._members.waiting(
                f"the trainer to broadcast the weights of version {version} to {len(engines)} engines"
            ):
                request = PublishRequest(version=version, store=bool(joining), group=place)
                reply = await self._trainer.call(request, PublishReply)
        except BaseException:
            self._applying.cancel()
            self._applying = None
            raise
        self._source = reply.store or self._source
        sent.set_result(reply)

    def _group_of(self, engines: list[Member]) -> Group | None:
        """The group of these engines, in this order; a new one where they have changed."""
        if self._transport == "store" or (self._transport == "auto" and not self._apart(engines)):
            return None
        if self._group is None or self._group.engines != engines:
            self._group = Group(next(self._generations), engines)
        return self._group

    def _apart(self, engines: list[Member]) -> bool:
        """Whether NCCL can bring them together with the trainer's rank 0: each process needs a GPU of its own."""
        devices = [self._trainer_device, *(device for engine in engines for device in engine.devices)]
        return CPU not in devices and len(set(devices)) == 1 + len(engines) * self._workers

    def _place(self, group: Group, rank: int, **of_pairs: Any) -> GroupPlace:
        assert self._source is not None
        return GroupPlace(
            host=self._source.host, port=self._meeting_port, generation=group.generation, rank=rank,
            world_size=2 if self._pairs else 1 + len(group.engines) * self._workers,
            patience_seconds=self._patience_seconds, **of_pairs,
        )  # fmt: skip

    def _senders_place(self, group: Group) -> GroupPlace:
        if not self._pairs:
            return self._place(group, SENDER)
        firsts = map(self._first_pair, group.engines)
        ranks = tuple(first + worker for first in firsts for worker in range(self._workers))
        return self._place(group, SENDER, pair=SENDER, pairs=ranks)

    def _receivers_places(self, group: Group) -> list[GroupPlace]:
        """Of each engine's first worker."""
        if self._pairs:
            return [self._place(group, 1, pair=self._first_pair(member)) for member in group.engines]
        return [self._place(group, 1 + index * self._workers) for index in range(len(group.engines))]

    def _first_pair(self, engine: Member) -> int:
        """The trainer rank on the device of an engine's first worker: `rollout-2` has the third share of the ranks' devices."""
        return int(engine.name.rpartition("-")[2]) * self._workers

    async def _broadcast_to(self, group: Group, version: int, sent: "asyncio.Future[PublishReply]") -> SyncReport:
        """A group that fails for one member is none any more; who does not have the version joins by the store."""
        places = self._receivers_places(group)
        asked = asyncio.gather(
            *(self._try(member, version, place) for member, place in zip(group.engines, places, strict=True)),
            return_exceptions=True,
        )
        try:
            replies = await asked
            trainers = await sent
        finally:
            asked.cancel()
            self._publishing = []
            self._members.notify()
        report = SyncReport(version, trainers.seconds)
        for member, reply in zip(group.engines, replies, strict=True):
            if isinstance(reply, BaseException):
                raise reply
            if reply is None:
                continue
            if reply.digest == trainers.digest:
                member.served = version
                report.replies.append(reply)
                continue
            self._emit(
                "warning", "WeightSyncFailed",
                f"{member.name} has weights of version {version} with digest {reply.digest[:16]}, the trainer sent {trainers.digest[:16] or 'nothing whole'}",
            )  # fmt: skip
        self._group_failures = 0 if report.replies else self._group_failures + 1
        if len(report.replies) < len(group.engines):
            self._group = None
            self._emit(
                "warning", "WeightGroupFailed",
                f"{len(report.replies)} of {len(group.engines)} engines took version {version} over group {group.generation}"
                f"{': ' + trainers.group_error if trainers.group_error else ''}. The others take it from the store.",
            )  # fmt: skip
        if self._group_failures == MAX_GROUP_FAILURES:
            self._transport = "store"
            self._emit(
                "warning",
                "WeightGroupsGivenUp",
                f"{MAX_GROUP_FAILURES} groups in a row failed: from now on weights go by the store. Set network.weightSync to store, or see the "
                "trainer's log for what stands between it and the engines.",
            )
        return report

    async def settled(self) -> SyncReport:
        """When the engines that were in service at the last publish have its version, or left service. Raises ConfigError."""
        assert self._applying is not None, "nothing was published"
        names = ", ".join(member.name for member in self._publishing if member.served != self.version)
        with self._members.waiting(f"{names} to take the weights of version {self.version}"):
            return await asyncio.shield(self._applying)

    async def _apply_to(self, engines: list[Member], report: SyncReport) -> SyncReport:
        try:
            done = await asyncio.gather(*map(self._try, engines), return_exceptions=True)
        finally:
            self._publishing = []
            self._members.notify()
        for result in done:
            if isinstance(result, BaseException):
                raise result
            if result is not None:
                report.replies.append(result)
        return report

    async def join_forever(self) -> None:
        """Bring engines that are alive but not in service in; runs beside the training loop, with what `publish` began. Raises ConfigError."""
        joining: dict[Member, asyncio.Task[None]] = {}
        try:
            while True:
                if self._applying is not None and self._applying.done():
                    self._applying.result()
                for member in [member for member, task in joining.items() if task.done()]:
                    joining.pop(member).result()
                if self._version is not None and self._resting is None:
                    busy = [*joining, *self._publishing, *self.in_service()]
                    for member in self._members.alive("rollout"):
                        if member not in busy:
                            joining[member] = asyncio.create_task(self._join(member))
                await self._members.wait(RETRY_SECONDS)
        finally:
            ending = [*joining.values(), *([self._applying] if self._applying else [])]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    async def wait_in_service(self, count: int, timeout_seconds: float) -> list[Member]:
        """Until `count` engines serve the current version. Raises PeerLostError that names who is missing."""
        deadline = time.monotonic() + timeout_seconds
        with self._members.waiting(f"{count} rollout servers with weights of version {self.version}"):
            while len(serving := self.in_service()) < count:
                left = deadline - time.monotonic()
                if left <= 0:
                    known = ", ".join(
                        f"{m.name} ({self._members.state(m)}, silent {self._members.silent_for(m):.0f} s)"
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
        """Until the engine serves the version that is current then, or is lost."""
        pause = RETRY_SECONDS
        while self._members.lives(member):
            if self._resting is None and await self._stored() and (reply := await self._try(member)) is not None:
                self._emit("info", "RolloutJoined", f"{member.name} serves weights of version {reply.version}")
                self._members.notify()
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RETRY_SECONDS)

    async def _stored(self) -> bool:
        """Whether the store has the current version. It is put there while the trainer still has it, else it comes with the next publish."""
        async with self._storing:
            version = self._version
            if self._source is not None and self._source.version == version:
                return True
            if self._publishing or version is None:
                return False
            try:
                reply = await self._trainer.call(PublishRequest(version=version), PublishReply)
            except TrainerFailed as error:
                if error.reason != NOT_HELD:
                    raise
                return False
            if self._version == version:
                self._source = reply.store
            return self._version == version

    async def _try(
        self, member: Member, version: int | None = None, group: GroupPlace | None = None
    ) -> ApplyWeightsReply | None:
        """One sync, from the store or over a group; None when it failed, which is told. Over a group the digest is still to be compared.
        Raises ConfigError."""
        try:
            reply = await self._apply(member, group, version)
            if group is None:
                member.served = reply.version
            return reply
        except PeerLostError as error:
            self._emit("warning", "WeightSyncFailed", str(error))
            return None

    async def _apply(self, member: Member, group: GroupPlace | None, version: int | None) -> ApplyWeightsReply:
        """Apply the current version to one engine and check what its workers read back. Raises PeerLostError naming it."""
        source = None if group else self._source
        version = source.version if source else version
        assert version is not None
        member.served = None
        request = ApplyWeightsRequest(
            version=version,
            store=source,
            group=group,
            timeout_seconds=self._timeout_seconds,
            clear_cache=self._clear_cache,
        )
        what = f"the sync of version {version}"
        try:
            reply: ApplyWeightsReply = await self._client.ask(
                member, "/v1/weights", request, ApplyWeightsReply, self._timeout_seconds + ANSWER_SECONDS, what
            )
        except RefusedError as error:
            if error.reply.reason == MISMATCH:
                raise ConfigError(
                    f"{error}. Trainer and engine do not load the same model: check model.path on both sides."
                ) from error
            raise
        member.devices = reply.devices
        if reply.version != version or (source and reply.digest != source.digest):
            wanted = f"digest {reply.digest[:16]} in place of {source.digest[:16]}" if source else "over a group"
            raise PeerLostError(
                f"{member.name} answered the sync of version {version} with version {reply.version}, {wanted}: it is kept out of service"
            )
        return reply
