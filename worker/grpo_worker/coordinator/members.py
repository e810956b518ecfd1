"""Who is alive: the registry of trainer and rollout processes, kept by their heartbeats.

Invariant: a member that was silent for longer than the limit is not used, and whoever waits for it is told so at the limit. A process
that was restarted under the same name is a new member (its `instance` differs), whatever the old one had reported. What is waited for,
and for how long, can be seen at any time. Who is gone for good is forgotten.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from grpo_worker.concurrency import Changes
from grpo_worker.errors import PeerLostError
from grpo_worker.metric_loggers.events import Level
from grpo_worker.protocol.messages import Heartbeat

Emit = Callable[[Level, str, str], None]
OVERDUE_SECONDS = 3.0  # a wait, or a silence, that is worth a word
FORGET_AFTER = 10  # limits of silence
WATCH_SECONDS = 1.0


class SilentError(PeerLostError):
    """A member was not heard of for too long; its process may live."""


@dataclass(eq=False)
class Member:
    """One process: its last heartbeat, and what this coordinator knows of it."""

    beat: Heartbeat
    last_seen: float  # monotonic seconds
    suspect: bool = False  # a request failed since the last heartbeat
    served: int | None = None  # the weight version that its workers read back to this coordinator
    devices: tuple[str, ...] = ()  # of an engine's workers, as far as it has told
    told_silent: bool = False

    @property
    def name(self) -> str:
        return self.beat.name

    @property
    def url(self) -> str:
        return self.beat.url


@dataclass(eq=False)
class _Wait:
    what: str
    since: float
    member: Member | None  # None: for something else than one process


class Members:
    """Registry and notice board: a change wakes whoever waits for a member."""

    def __init__(
        self,
        timeout_seconds: float,
        clock: Callable[[], float],
        emit: Emit = lambda level, reason, message: None,
        heartbeat_seconds: float = 1.0,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._overdue_seconds = max(2 * heartbeat_seconds, min(OVERDUE_SECONDS, timeout_seconds / 2))
        self._clock = clock
        self._emit = emit
        self._members: dict[str, Member] = {}
        self._waits: list[_Wait] = []
        self._changes = Changes()

    def beat(self, beat: Heartbeat) -> bool:
        """Record a heartbeat. True when it is the first of its process."""
        self._forget()
        member = self._members.get(beat.name)
        if member is None or member.beat.instance != beat.instance:
            self._members[beat.name] = Member(beat, self._clock())
            self.notify()
            return True
        if member.told_silent:
            self._emit("info", "MemberHeard", f"{beat.name} is heard of again after {self.silent_for(member):.0f} s")
        moved = member.beat.state != beat.state or member.suspect or self._silent(member)
        member.beat, member.last_seen, member.suspect, member.told_silent = beat, self._clock(), False, False
        if moved:
            self.notify()
        return False

    def suspect(self, member: Member) -> None:
        """A request to it failed: it is not used before its next heartbeat."""
        member.suspect = True

    def alive(self, role: str) -> list[Member]:
        """Members of `role` that are ready and not silent, by name."""
        return [m for m in self.present() if m.beat.role == role and m.beat.state == "ready"]

    def present(self) -> list[Member]:
        """Members that are not silent and have not failed, ready or still starting, by name."""
        return [m for m in self.all() if m.beat.state != "failed" and not m.suspect and not self._silent(m)]

    def all(self) -> Iterable[Member]:
        """Also those that are lost, until they are forgotten."""
        return [self._members[name] for name in sorted(self._members)]

    def lives(self, member: Member) -> bool:
        """True while it is the process of its name, ready and not silent; one failed request is no death."""
        return self._members.get(member.name) is member and self.state(member) == "ready"

    def state(self, member: Member) -> str:
        """starting, ready, failed (as it says), or lost."""
        return "lost" if self._silent(member) else member.beat.state

    def silent_for(self, member: Member) -> float:
        return self._clock() - member.last_seen

    def notify(self) -> None:
        self._changes.notify()

    async def wait(self, timeout_seconds: float) -> None:
        """Until something changed, or the time is over."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changes.wait()
        except TimeoutError:
            return

    async def watch(self, member: Member, what: str) -> None:
        """Ends with the member: `what` waits for it meanwhile. Raises SilentError after the limit without a heartbeat, PeerLostError
        when another process has its name."""
        looked = self._clock()
        with self.waiting(what, member):
            while True:
                silent, since = self.silent_for(member), self._clock() - looked
                looked += since
                frozen = since > self._timeout_seconds / 2  # we stood still: heartbeats may lie unread
                if self._silent(member) and not frozen:
                    raise SilentError(
                        f"{member.name} was silent for {silent:.0f} s (network.memberTimeoutSeconds) during {what}"
                    )
                if self._members.get(member.name) is not member:
                    raise PeerLostError(f"{member.name} was started again during {what}")
                if silent > self._overdue_seconds and not member.told_silent and not frozen:
                    member.told_silent = True
                    self._emit("warning", "MemberSilent", self._silence(member))
                limit = self._timeout_seconds if member.told_silent else self._overdue_seconds
                left = WATCH_SECONDS if frozen else max(limit - silent, 0.0) + 0.01
                # Looked at several times within the limit: a longer pause than half of it then means that we stood still.
                await self.wait(min(left, WATCH_SECONDS, self._timeout_seconds / 4))

    @contextmanager
    def waiting(self, what: str, member: Member | None = None) -> Iterator[None]:
        """While the block runs, `waits` knows of it."""
        wait = _Wait(what, self._clock(), member)
        self._waits.append(wait)
        try:
            yield
        finally:
            self._waits.remove(wait)

    def waits(self) -> list[str]:
        """What takes long now, a sentence each: silent members with what waits for them, then other waits."""
        silent = {
            wait.member for wait in self._waits if wait.member and self.silent_for(wait.member) > self._overdue_seconds
        }
        others = [wait for wait in self._waits if not wait.member and self._age(wait) > OVERDUE_SECONDS]
        return [
            *map(self._silence, sorted(silent, key=lambda member: member.name)),
            *(f"waiting for {wait.what} for {self._age(wait):.0f} s" for wait in others),
        ]

    def _silence(self, member: Member) -> str:
        what = sorted({wait.what for wait in self._waits if wait.member is member})
        more = f" and {len(what) - 3} more" if len(what) > 3 else ""
        return (
            f"{member.name} has been silent for {self.silent_for(member):.0f} s and is lost after {self._timeout_seconds:g} s; "
            f"what waits for it: {', '.join(what[:3])}{more}"
        )

    def _age(self, wait: _Wait) -> float:
        return self._clock() - wait.since

    def _silent(self, member: Member) -> bool:
        return self.silent_for(member) > self._timeout_seconds

    def _forget(self) -> None:
        """Those that said farewell, and those that have been lost for long: after a scale-down nobody asks for them any more."""
        for member in list(self._members.values()):
            left = bool(member.beat.terminating) and member.beat.role == "rollout"
            if self.silent_for(member) > self._timeout_seconds * (1 if left else FORGET_AFTER):
                del self._members[member.name]
