"""Who is alive, by heartbeats and a clock."""

import asyncio
import time

import msgspec
import pytest

from grpo_worker.coordinator.members import Members, SilentError
from grpo_worker.protocol.messages import Heartbeat

BEAT = Heartbeat(role="rollout", name="rollout-0", instance="a", url="http://host:1", state="ready")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def members(clock: Clock) -> Members:
    return Members(30.0, clock)


def names(members: Members) -> list[str]:
    return [member.name for member in members.alive("rollout")]


def changed(**fields: object) -> Heartbeat:
    return msgspec.structs.replace(BEAT, **fields)


def test_the_first_heartbeat_of_a_process_is_told(members: Members) -> None:
    assert members.beat(BEAT)
    assert not members.beat(BEAT)
    assert members.beat(changed(instance="b"))


@pytest.mark.parametrize(("seconds", "alive"), [(0.0, True), (30.0, True), (30.1, False)])
def test_a_member_lives_as_long_as_its_limit(members: Members, clock: Clock, seconds: float, alive: bool) -> None:
    members.beat(BEAT)
    clock.now += seconds
    assert names(members) == (["rollout-0"] if alive else [])


@pytest.mark.parametrize("state", ["starting", "failed"])
def test_only_a_ready_member_is_used(members: Members, state: str) -> None:
    members.beat(changed(state=state))
    assert names(members) == []
    assert [member.name for member in members.all()] == ["rollout-0"]


def test_members_are_listed_by_role_and_name(members: Members) -> None:
    for name, role in (("rollout-2", "rollout"), ("trainer-0", "trainer"), ("rollout-1", "rollout")):
        members.beat(changed(name=name, role=role))
    assert names(members) == ["rollout-1", "rollout-2"]
    assert [member.name for member in members.alive("trainer")] == ["trainer-0"]


def test_a_suspect_is_used_again_after_its_next_heartbeat(members: Members) -> None:
    members.beat(BEAT)
    (member,) = members.alive("rollout")
    members.suspect(member)
    assert names(members) == []
    members.beat(BEAT)
    assert names(members) == ["rollout-0"]


def test_a_restarted_process_is_another_member(members: Members) -> None:
    members.beat(BEAT)
    (old,) = members.alive("rollout")
    assert members.lives(old)
    members.beat(changed(instance="b"))
    assert not members.lives(old)


def test_a_silent_process_is_not_current(members: Members, clock: Clock) -> None:
    members.beat(BEAT)
    (member,) = members.alive("rollout")
    clock.now += 31
    assert not members.lives(member)
    assert members.silent_for(member) == 31


@pytest.mark.parametrize("change", [{}, {"instance": "b"}, {"state": "failed"}, {"name": "rollout-1"}])
@pytest.mark.asyncio
async def test_who_waits_is_woken_by_a_change_alone(members: Members, change: dict[str, str]) -> None:
    members.beat(BEAT)
    waiting = asyncio.create_task(members.wait(5.0))
    await asyncio.sleep(0)
    members.beat(changed(**change))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert waiting.done() == bool(change)
    waiting.cancel()


@pytest.mark.asyncio
async def test_waiting_ends_with_its_limit(members: Members) -> None:
    async with asyncio.timeout(5):
        await members.wait(0.01)


def test_who_is_there_to_be_told_something(members: Members, clock: Clock) -> None:
    """Ready or loading; not who has failed or fell silent."""
    members.beat(changed(name="silent"))
    clock.now += 30.1
    members.beat(changed(name="ready"))
    members.beat(changed(name="loading", state="starting"))
    members.beat(changed(name="leaving", state="failed"))
    assert [member.name for member in members.present()] == ["loading", "ready"]


def test_after_a_scale_down_who_is_gone_is_said_to_be_lost_and_then_forgotten(members: Members, clock: Clock) -> None:
    def listed() -> dict[str, str]:
        members.beat(changed(name="trainer-0", role="trainer"))
        return {member.name: members.state(member) for member in members.all() if member.beat.role == "rollout"}

    members.beat(changed(name="rollout-0"))
    members.beat(changed(name="rollout-1", state="failed", terminating="rollout-1"))
    assert listed() == {"rollout-0": "ready", "rollout-1": "failed"}
    clock.now += 31
    assert listed() == {"rollout-0": "lost"}, "it took leave: nobody waits for it"
    clock.now += 300
    assert listed() == {}
    members.beat(changed(name="rollout-0"))
    assert listed() == {"rollout-0": "ready"}, "and may come back"


@pytest.mark.asyncio
@pytest.mark.parametrize("limit", [0.3, 1.0])
async def test_who_is_silent_is_lost_at_its_limit_however_short(limit: float) -> None:
    members = Members(limit, time.monotonic)
    members.beat(BEAT)
    (member,) = members.all()
    with pytest.raises(SilentError, match="memberTimeoutSeconds"):
        async with asyncio.timeout(10 * limit):
            await members.watch(member, "an update")
