"""An engine gets prompts only after it was seen to hold the current weights."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from coordinator_helpers import Engine, World, groups, heartbeats, world

from grpo_worker.coordinator import weight_sync
from grpo_worker.coordinator.groups import Group
from grpo_worker.errors import PeerLostError
from grpo_worker.protocol.messages import ErrorReply

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sync, "RETRY_SECONDS", 0.02)


@asynccontextmanager
async def joining(here: World) -> AsyncIterator[None]:
    """The service brings engines in, and everybody sends heartbeats."""
    tasks = [asyncio.create_task(here.weights.join_forever()), asyncio.create_task(heartbeats(here))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def serving(here: World) -> list[str]:
    return [member.name for member in here.weights.in_service()]


async def until_serving(here: World, *names: str) -> None:
    async with asyncio.timeout(10):
        while serving(here) != list(names):
            await here.members.wait(0.02)


async def test_a_published_version_is_applied_to_every_engine() -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1")]
    async with world(*engines, version=None) as here:
        assert here.weights.version is None
        assert serving(here) == []
        report = await here.weights.publish(3)
        assert here.weights.version == 3
        assert serving(here) == ["rollout-0", "rollout-1"]
        assert [engine.syncs for engine in engines] == [[3], [3]]
    metrics = report.metrics()
    assert metrics["weight_sync/engines"] == 2.0
    assert metrics["weight_sync/bytes"] == 2000.0
    assert metrics["weight_sync/bytes_per_second"] == 2000.0  # 1000 bytes in half a second, each
    assert metrics["weight_sync/pause_seconds"] == 0.3
    assert metrics["weight_sync/publish_seconds"] == 0.125


async def test_the_next_version_takes_engines_out_of_service_until_they_have_it() -> None:
    good, failing = Engine("rollout-0"), Engine("rollout-1")
    async with world(good, failing, version=0) as here:
        failing.refusal = ErrorReply(reason="EngineDead", message="the engine is dead")
        await here.weights.publish(1)
        assert serving(here) == ["rollout-0"]
        assert {member.name: member.served for member in here.members.alive("rollout")} == {
            "rollout-0": 1,
            "rollout-1": None,
        }
        assert here.events[-1][1:] == (
            "WeightSyncFailed",
            "rollout-1 refused the sync of version 1: the engine is dead",
        )


async def test_an_engine_that_reads_back_another_digest_is_kept_out_of_service() -> None:
    liar = Engine("rollout-0")
    liar.digest = "something else"
    async with world(liar, version=0) as here:
        assert serving(here) == []
        assert "kept out of service" in here.events[-1][2]
        async with joining(here):
            async with asyncio.timeout(10):
                while len(liar.syncs) < 3:
                    await here.members.wait(0.02)
            assert serving(here) == []
            liar.digest = None
            await until_serving(here, "rollout-0")


async def test_a_restarted_engine_gets_the_current_weights_before_any_prompt() -> None:
    engine = Engine("rollout-0")
    async with world(engine, version=2) as here:
        engine.restart()
        here.beat()
        assert serving(here) == []
        engine.log.clear()
        done: list[Group] = []
        dispatcher = here.dispatcher(done.append)
        dispatcher.submit(groups(2), atomic=True)
        async with joining(here), asyncio.timeout(10):
            await dispatcher.run(until_idle=True)
    assert engine.log == ["weights 2", "generate"]
    assert {group.oldest_version for group in done} == {2}


async def test_a_late_joiner_serves_the_current_version() -> None:
    first, late = Engine("rollout-0"), Engine("rollout-1")
    async with world(first, version=5) as here, joining(here):
        await here.join(late)
        await until_serving(here, "rollout-0", "rollout-1")
        assert late.syncs == [5]
        assert first.syncs == [5]
        assert ("info", "RolloutJoined", "rollout-1 serves weights of version 5") in here.events


async def test_an_engine_that_died_during_a_sync_leaves_the_others_serving() -> None:
    alive, dead = Engine("rollout-0"), Engine("rollout-1")
    async with world(alive, dead, version=0) as here:
        await dead.stop()
        report = await here.weights.publish(1)
        assert serving(here) == ["rollout-0"]
        assert len(report.replies) == 1
        assert "rollout-1 at http://127.0.0.1" in here.events[-1][2]


async def test_a_silent_engine_is_not_in_service() -> None:
    engine = Engine("rollout-0")
    async with world(engine) as here:
        here.clock.pushed = 31.0
        assert serving(here) == []
        here.beat()
        assert serving(here) == ["rollout-0"]


async def test_waiting_for_engines_ends_with_who_is_missing() -> None:
    async with world(Engine("rollout-0"), version=7) as here:
        assert [member.name for member in await here.weights.wait_in_service(1, 1.0)] == ["rollout-0"]
        with pytest.raises(
            PeerLostError, match=r"1 of 2 rollout servers serve weights of version 7.*rollout-0 \(ready"
        ):
            await here.weights.wait_in_service(2, 0.1)


async def test_waiting_for_engines_sees_one_that_joins_meanwhile() -> None:
    late = Engine("rollout-1")
    async with world(Engine("rollout-0")) as here, joining(here):
        waiting = asyncio.create_task(here.weights.wait_in_service(2, 10.0))
        await here.join(late)
        assert [member.name for member in await waiting] == ["rollout-0", "rollout-1"]


async def test_a_version_published_while_an_engine_joins_is_the_one_that_it_ends_with() -> None:
    engine = Engine("rollout-0")
    async with world(version=0) as here, joining(here):
        await here.join(engine)
        await asyncio.gather(*(here.weights.publish(version) for version in (1,)))
        await until_serving(here, "rollout-0")
        assert engine.version == here.weights.version == 1
