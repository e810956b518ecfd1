"""Prompts out to the engines, samples back.

Invariants:
- A group that came back is never asked for again, so nothing is generated twice for training.
- A prompt that did not come back goes out again, to any engine in service, until `blame` gives it up: then it is a failed group with
  its reason. A suspect is tried last, and alone in its engine.
"""

import asyncio
import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from grpo_worker.coordinator.blame import PERMANENT, End, convicted, end_of, gives_up, is_suspect
from grpo_worker.coordinator.groups import Group, GroupState, Sample
from grpo_worker.coordinator.member_client import MemberClient
from grpo_worker.coordinator.members import Emit, Member, Members
from grpo_worker.coordinator.weight_sync import WeightSync
from grpo_worker.errors import PeerLostError
from grpo_worker.protocol.http import RefusedError, UnreachableError
from grpo_worker.protocol.messages import Array, GenerateRequest, GroupResult, PromptRequest, SampleResult, Sampling

PROMPTS_AHEAD = 1.5  # what one engine is sent, over what it can run at a time
WATCH_SECONDS = 0.5
CHUNK_PROMPTS = 8  # prompts of one request when requests are not atomic


def derived_seed(*parts: object) -> int:
    """A seed that is a function of what is generated, not of when or where: 63 bits of the parts' hash."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def prompt_seed(base: int, uid: str, purpose: str) -> int:
    """Seed of a prompt's samples."""
    return derived_seed(base, purpose, uid)


@dataclass(frozen=True)
class DispatchOptions:
    """How requests are made."""

    sampling: Sampling
    purpose: str
    seed: int | None  # None: the engine's own generator
    deadline_seconds: float
    max_attempts: int
    max_num_seqs: int  # of one engine; bounds the prompts that it is sent ahead of need
    no_engine_timeout_seconds: float
    log_probs_one_in: int = 1  # one prompt in so many, whichever its uid makes it; 0: none

    def wants_log_probs(self, uid: str) -> bool:
        return self.log_probs_one_in > 0 and derived_seed(uid) % self.log_probs_one_in == 0

    def waves(self, prompts: int) -> int:
        """How often an engine with so many prompts fills its `max_num_seqs` places: a deadline is a prompt's own, not its queue's."""
        return max(1, math.ceil(prompts * self.sampling.n / self.max_num_seqs))


def prompt_request(options: DispatchOptions, group: Group) -> PromptRequest:
    """What an engine gets of a group."""
    return PromptRequest(
        id=group.uid,
        token_ids=Array.of(group.prompt.token_ids, "int32"),
        seed=None if options.seed is None else prompt_seed(options.seed, group.uid, options.purpose),
        log_probs=options.wants_log_probs(group.uid),
    )


def samples_of(result: GroupResult) -> list[Sample]:
    """What an engine gave for a group."""
    return [Sample(s.token_ids.numpy(), _log_probs(s), s.finish_reason, list(s.versions)) for s in result.samples]


class ServiceLimit:
    """How long prompts may wait without any engine in service."""

    def __init__(self, members: Members, weights: WeightSync, limit_seconds: float) -> None:
        self._members = members
        self._weights = weights
        self._limit_seconds = limit_seconds
        self._served = time.monotonic()
        self._wait: ExitStack | None = None  # while it is known as something that is waited for

    def check(self, waiting: int) -> None:
        """To be called now and then with the number of prompts that wait. Raises PeerLostError."""
        now = time.monotonic()
        if not waiting or self._weights.in_service():
            self._served = now
            self.close()
            return
        if self._wait is None:
            self._wait = ExitStack()
            self._wait.enter_context(self._members.waiting(f"a rollout server in service, for {waiting} prompts"))
        if now - self._served > self._limit_seconds:
            raise PeerLostError(
                f"no rollout server was in service for {self._limit_seconds:.0f} s while {waiting} prompts waited. See the rollout logs."
            )

    def close(self) -> None:
        """Nothing waits any more."""
        if self._wait is not None:
            self._wait.close()
            self._wait = None


class RolloutDispatcher(ABC):
    """The rollout node of the pipeline: groups of prompts in, groups of samples out; `on_done(group)` gets each once, in state SCORING
    or FAILED."""

    def __init__(
        self,
        client: MemberClient,
        members: Members,
        weights: WeightSync,
        emit: Emit,
        options: DispatchOptions,
        on_done: Callable[[Group], None],
    ) -> None:
        self._client = client
        self._members = members
        self._weights = weights
        self._emit = emit
        self._options = options
        self._on_done = on_done
        self._queue: deque[Group] = deque()
        self._atomic = False
        self._wake = asyncio.Event()
        self._service = ServiceLimit(members, weights, options.no_engine_timeout_seconds)
        self._requests = 0
        self.generated_tokens = 0
        self.redispatched = 0  # prompts, or turns, that were asked for once more

    def submit(self, groups: Sequence[Group], *, atomic: bool) -> None:
        """Queue groups. `atomic`: split evenly over the engines in one request each, so that results do not depend on timing; the
        dispatcher must be idle. Without meaning for agents: what engines run together depends on when they ask."""
        self._queue.extend(groups)
        self._atomic = atomic
        self._wake.set()

    async def run(self, *, until_idle: bool = False) -> None:
        """Dispatch until cancelled, or until nothing is left. Raises PeerLostError when no engine serves for longer than the limit."""
        try:
            while not (until_idle and self.idle):
                self._wake.clear()
                self._land()
                self._launch()
                self._watch()
                if until_idle and self.idle:
                    return
                try:
                    async with asyncio.timeout(WATCH_SECONDS):  # members come and go without waking us
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            self._service.close()
            tasks = self._under_way()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    @abstractmethod
    def idle(self) -> bool: ...

    @abstractmethod
    def _land(self) -> None:
        """Collect what has ended."""

    @abstractmethod
    def _launch(self) -> None:
        """Send what engines have room for."""

    @abstractmethod
    def _watch(self) -> None:
        """Look after what takes too long."""

    @abstractmethod
    def _under_way(self) -> Sequence["asyncio.Task[None]"]:
        """What has to end with the run."""


@dataclass
class _Flight:
    """One request under way."""

    member: Member
    pending: dict[str, Group]
    alone: bool  # in its engine
    task: asyncio.Task[None] = field(init=False)
    reason: str = ""
    end: End = End.UNFINISHED


class Dispatcher(RolloutDispatcher):
    """A prompt's samples are one request's, of one turn."""

    def __init__(
        self,
        client: MemberClient,
        members: Members,
        weights: WeightSync,
        emit: Emit,
        options: DispatchOptions,
        on_done: Callable[[Group], None],
    ) -> None:
        super().__init__(client, members, weights, emit, options, on_done)
        self._suspects: list[Group] = []  # tried last and alone
        self._flights: list[_Flight] = []

    @property
    def idle(self) -> bool:
        return not (self._queue or self._suspects or self._flights)

    def _watch(self) -> None:
        self._service.check(0 if self._flights else len(self._queue) + len(self._suspects))

    def _under_way(self) -> list["asyncio.Task[None]"]:
        return [flight.task for flight in self._flights]

    def _launch(self) -> None:
        serving = self._weights.in_service()
        free = [m for m in serving if not any(flight.alone and flight.member is m for flight in self._flights)]
        if not self._queue and serving:
            for group in sorted(self._suspects, key=lambda group: (len(group.misfortunes), group.order)):
                # Where it had the least bad luck: one bad engine shall not convict a prompt.
                least = min(group.misfortunes.count(member.name) for member in serving)
                idle = [m for m in free if not self._held(m) and group.misfortunes.count(m.name) == least]
                if idle:
                    self._suspects.remove(group)
                    self._send(idle[0], [group], alone=True)
            return
        if self._atomic and serving:
            self._atomic = False  # what fails is sent again as it comes
            size = math.ceil(len(self._queue) / len(serving))
            for member in serving:
                if share := [self._queue.popleft() for _ in range(min(size, len(self._queue)))]:
                    self._send(member, share, atomic=True)
            return
        limit = max(CHUNK_PROMPTS, math.ceil(PROMPTS_AHEAD * self._options.max_num_seqs / self._options.sampling.n))
        while self._queue and free:
            member = min(free, key=self._held)
            if self._held(member) >= limit:
                return
            self._send(member, [self._queue.popleft() for _ in range(min(CHUNK_PROMPTS, len(self._queue)))])

    def _send(self, member: Member, groups: list[Group], *, atomic: bool = False, alone: bool = False) -> None:
        options = self._options
        for group in groups:
            group.state = GroupState.RUNNING
        self._requests += 1
        request = GenerateRequest(
            request_id=f"{options.purpose}-{self._requests}",
            prompts=[prompt_request(options, group) for group in groups],
            sampling=options.sampling,
            deadline_seconds=options.deadline_seconds * options.waves(self._held(member) + len(groups)),
            atomic=atomic,
            min_weight_version=self._weights.version,
        )
        flight = _Flight(member, {group.uid: group for group in groups}, alone)
        flight.task = asyncio.create_task(self._fly(flight, request))
        self._flights.append(flight)

    def _held(self, member: Member) -> int:
        """Prompts that an engine was sent and has not answered."""
        return sum(len(flight.pending) for flight in self._flights if flight.member is member)

    async def _fly(self, flight: _Flight, request: GenerateRequest) -> None:
        try:
            end = await self._client.generate(flight.member, request, lambda result: self._returned(flight, result))
            self.generated_tokens += end.generated_tokens
            flight.reason = flight.reason or f"{flight.member.name} ended its reply early"
        except PeerLostError as error:
            if flight.end is not End.ENGINE_DIED:
                flight.reason, flight.end = str(error), end_of(error, flight.member)
            if isinstance(error, (RefusedError, UnreachableError)):
                self._weights.doubt(flight.member)
        finally:
            self._wake.set()

    def _returned(self, flight: _Flight, result: GroupResult) -> None:
        group = flight.pending.get(result.id)
        if group is None:
            return  # not asked for, or told twice: the first answer counts
        name = flight.member.name
        if result.error_kind == "engine_dead":
            flight.reason, flight.end = f"{name}: {result.error}", End.ENGINE_DIED
            self._members.suspect(flight.member)
            return  # it stays pending
        if result.error_kind == "deadline" or any(sample.finish_reason == "abort" for sample in result.samples):
            flight.reason = f"{name}: {result.error or 'aborted the request'}"
            return
        del flight.pending[result.id]
        if result.error is not None:
            self._again(flight, group, f"{name}: {result.error}", End.FAILED, at_once=result.error_kind in PERMANENT)
        else:
            group.samples = samples_of(result)
            group.state = GroupState.SCORING
            self._on_done(group)
        self._wake.set()

    def _land(self) -> None:
        """Collect finished requests; what did not come back is sent again, in order, before what has not been sent."""
        for flight in [flight for flight in self._flights if flight.task.done()]:
            self._flights.remove(flight)
            if error := flight.task.exception():
                raise error
            left = sorted(flight.pending.values(), key=lambda group: -group.order)
            if left and flight.end is not End.UNFINISHED:
                self._emit("warning", "RolloutLost", f"{flight.reason}; {len(left)} prompts go out again")
            alone = flight.alone or (flight.end is End.UNFINISHED and len(left) == 1)
            for group in left:
                self._again(flight, group, flight.reason, flight.end, alone=alone)

    def _again(
        self, flight: _Flight, group: Group, reason: str, end: End, *, alone: bool = False, at_once: bool = False
    ) -> None:
        """Back to the queue, or failed (`at_once`: whatever it has tried)."""
        group.restart()
        group.failure = reason
        limit = self._options.max_attempts
        failed = gives_up(group, end, flight.member.name, alone=alone, max_attempts=limit) or at_once
        if failed:
            group.failure += convicted(group)
            group.state = GroupState.FAILED
            self._emit("error", "PromptFailed", f"prompt {group.uid} failed: {group.failure}")
            self._on_done(group)
            return
        self.redispatched += 1
        if is_suspect(group):
            self._suspects.append(group)
        else:
            self._queue.appendleft(group)


def _log_probs(sample: SampleResult) -> np.ndarray:
    log_probs = sample.log_probs.numpy()
    return log_probs if len(log_probs) else np.full(len(sample.token_ids.numpy()), np.nan, dtype=np.float32)
