"""Who is alive: the registry of trainer and rollout processes, kept by their heartbeats.

Invariant: a member that was silent for longer than the limit is not used, and a process that was restarted under the same name is a
new member (its `instance` differs), whatever the old one had reported.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from grpo_worker.protocol.messages import Heartbeat


@dataclass
class Member:
    """The last heartbeat of one process."""

    beat: Heartbeat
    last_seen: float  # monotonic seconds
    suspect: bool = False  # a request failed since the last heartbeat

    @property
    def name(self) -> str:
        return self.beat.name

    @property
    def url(self) -> str:
        return self.beat.url


class Members:
    """Registry and notice board: `changed` wakes whoever waits for a member."""

    def __init__(self, timeout_seconds: float, clock: Callable[[], float]) -> None:
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._changed = asyncio.Event()

    def beat(self, beat: Heartbeat) -> bool:
        """Record a heartbeat. True when it is the first of its process."""
        known = self._members.get(beat.name)
        new = known is None or known.beat.instance != beat.instance
        moved = new or known is None or known.beat.state != beat.state or known.suspect
        self._members[beat.name] = Member(beat, self._clock())
        if moved:
            self.notify()
        return new

    def suspect(self, name: str) -> None:
        """A request to it failed: it is not used before its next heartbeat."""
        if member := self._members.get(name):
            member.suspect = True

    def alive(self, role: str) -> list[Member]:
        """Members of `role` that are ready and not silent, by name."""
        return [m for m in self._of(role) if m.beat.state == "ready" and not m.suspect and not self._silent(m)]

    def present(self) -> list[Member]:
        """Members that are not silent and have not failed, ready or still starting, by name."""
        return [m for m in self.all() if m.beat.state != "failed" and not m.suspect and not self._silent(m)]

    def all(self) -> Iterable[Member]:
        return [self._members[name] for name in sorted(self._members)]

    def is_current(self, member: Member) -> bool:
        """True while `member` is the living process of its name."""
        known = self._members.get(member.name)
        return known is not None and known.beat.instance == member.beat.instance and not self._silent(known)

    def silent_for(self, member: Member) -> float:
        return self._clock() - member.last_seen

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, timeout_seconds: float) -> None:
        """Until something changed, or the time is over."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    def _of(self, role: str) -> list[Member]:
        return [m for m in self.all() if m.beat.role == role]

    def _silent(self, member: Member) -> bool:
        return self.silent_for(member) > self._timeout_seconds
