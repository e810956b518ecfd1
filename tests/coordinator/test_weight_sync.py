"""An engine gets prompts only after it was seen to hold the current weights."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from coordinator_helpers import TRAINER_GPU, Engine, World, groups, heartbeats, published, sent, world

from grpo_worker.coordinator import members, weight_sync
from grpo_worker.coordinator.groups import Group
from grpo_worker.coordinator.weight_sync import SyncReport
from grpo_worker.errors import ConfigError, PeerLostError
from grpo_worker.protocol.messages import ErrorReply, PublishReply, PublishRequest

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


async def publish(here: World, version: int) -> SyncReport:
    await here.weights.publish(version)
    return await here.weights.settled()


async def test_a_published_version_is_applied_to_every_engine() -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1")]
    async with world(*engines, version=None) as here:
        assert here.weights.version is None
        assert serving(here) == []
        report = await publish(here, 3)
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
        await publish(here, 1)
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
        report = await publish(here, 1)
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
        await publish(here, 1)
        await until_serving(here, "rollout-0")
        assert engine.version == here.weights.version == 1


async def test_a_publish_does_not_wait_for_an_engine_that_was_out_of_service() -> None:
    """Its sync hangs, beside training: neither a publish nor another engine that joins waits for it."""
    serving_one, hanging, late = Engine("rollout-0"), Engine("rollout-1"), Engine("rollout-2")
    hanging.hang_at_sync = True
    async with world(serving_one, version=0, timeout_seconds=60.0) as here, joining(here):
        await here.join(hanging)
        while not hanging.syncs:
            await here.members.wait(0.02)
        async with asyncio.timeout(5):
            await publish(here, 1)
            await here.join(late)
            await until_serving(here, "rollout-0", "rollout-2")
        assert hanging.syncs == [0]
        hanging.released.set()
        hanging.hang_at_sync = False
        await until_serving(here, "rollout-0", "rollout-1", "rollout-2")
        assert hanging.syncs == [0, 1], "the version that is current when it is free again"


async def test_engines_take_a_version_beside_what_follows_and_the_next_one_waits_for_them() -> None:
    quick, slow = Engine("rollout-0"), Engine("rollout-1")
    async with world(quick, slow, version=0, timeout_seconds=60.0) as here:
        slow.hang_at_sync = True
        async with asyncio.timeout(5):
            await here.weights.publish(1)
            while serving(here) != ["rollout-0"]:
                await here.members.wait(0.02)
        following = asyncio.create_task(publish(here, 2))
        await asyncio.sleep(0.1)
        assert here.weights.version == 1
        here.clock.pushed = 5.0
        here.beat()
        assert "waiting for rollout-1 to take the weights of version 1 for 5 s" in here.members.waits()
        slow.hang_at_sync = False
        slow.released.set()
        async with asyncio.timeout(5):
            report = await following
        assert (report.version, len(report.replies)) == (2, 2)
        assert [engine.syncs for engine in (quick, slow)] == [[0, 1, 2], [0, 1, 2]]


async def test_weights_that_do_not_fit_end_the_run_though_nobody_waits_for_them() -> None:
    engine = Engine("rollout-0")
    async with world(engine, version=0) as here:
        engine.refusal = ErrorReply(reason="WeightsMismatch", message="no lm_head.weight")
        serving_them = asyncio.create_task(here.weights.join_forever())
        await here.weights.publish(1)
        async with asyncio.timeout(5):
            with pytest.raises(ConfigError, match=r"no lm_head.weight. Trainer and engine do not load the same model"):
                await serving_them


async def test_an_engine_that_falls_silent_in_a_sync_costs_a_publish_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "WATCH_SECONDS", 0.02)
    alive, silent = Engine("rollout-0"), Engine("rollout-1")
    async with world(alive, silent, version=0, timeout_seconds=300.0) as here:
        silent.hang_at_sync = True
        publishing = asyncio.create_task(publish(here, 1))
        while not silent.syncs[1:]:
            await asyncio.sleep(0.01)
        here.clock.pushed = 20.0
        here.members.beat(alive.beat())
        await asyncio.sleep(0.1)
        assert not publishing.done()
        (waits,) = [wait for wait in here.members.waits() if "rollout-1" in wait and "silent" in wait]
        assert "20 s" in waits and "lost after 30 s" in waits and "the sync of version 1" in waits
        here.clock.pushed = 31.0
        here.members.beat(alive.beat())
        async with asyncio.timeout(2):
            report = await publishing
        assert len(report.replies) == 1
        assert serving(here) == ["rollout-0"]
        assert any(
            reason == "WeightSyncFailed" and "rollout-1 was silent for 3" in text for _, reason, text in here.events
        )


async def test_a_sync_that_fails_again_and_again_is_tried_ever_more_rarely() -> None:
    engine = Engine("rollout-0")
    async with world(version=0) as here, joining(here):
        engine.refusal = ErrorReply(reason="EngineDead", message="no")
        await here.join(engine)
        await asyncio.sleep(1.0)
        tries = len(engine.syncs)
        assert 3 <= tries <= 7, "0.02 s, doubled each time"
        engine.refusal = None
        await until_serving(here, "rollout-0")


# --- over a group -------------------------------------------------------------------------------------------------------------


def asked(here: World) -> list[tuple[int, bool, int]]:
    """Of the trainer: version, whether into the store, members of the group."""
    requests = [call for call in here.trainer.calls if isinstance(call, PublishRequest)]
    return [(call.version, call.store, call.group.world_size if call.group else 0) for call in requests]


async def test_the_first_version_comes_from_the_store_and_the_next_ones_over_one_group() -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1")]
    async with world(*engines, version=0, transport="nccl", workers_of_an_engine=2) as here:
        for version in (1, 2):
            report = await publish(here, version)
            assert [reply.digest for reply in report.replies] == [sent(version)] * 2
            assert serving(here) == ["rollout-0", "rollout-1"]
        assert asked(here) == [(0, True, 0), (1, False, 5), (2, False, 5)]
        (trainers,) = {call.group for call in here.trainer.calls if call.group}
    assert (trainers.host, trainers.port, trainers.rank) == ("127.0.0.1", 5000, 0)
    for engine, first_rank in zip(engines, (1, 3), strict=True):
        assert engine.places == [msgspec.structs.replace(trainers, rank=first_rank)] * 2
    assert [reason for _, reason, _ in here.events if "Weight" in reason] == []


@pytest.mark.parametrize(
    ("devices", "shared"),
    [
        ([("GPU 1", "GPU 2"), ("GPU 3", "GPU 4")], False),
        ([("GPU 1", "GPU 2"), ("GPU 2", "GPU 3")], True),
        ([("GPU 1", "GPU 2"), ("GPU 3", TRAINER_GPU)], True),
        ([("GPU 1", "GPU 2"), ("cpu", "cpu")], True),
        ([("GPU 1", "GPU 2"), ("GPU 3",)], True),
    ],
)
async def test_left_to_itself_a_group_is_made_where_each_process_has_a_gpu_of_its_own(
    devices: list[tuple[str, ...]], shared: bool
) -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1")]
    for engine, its_own in zip(engines, devices, strict=True):
        engine.devices = its_own
    async with world(*engines, version=0, transport="auto", workers_of_an_engine=2) as here:
        await publish(here, 1)
        assert asked(here) == [(0, True, 0), ((1, True, 0) if shared else (1, False, 5))]
        assert serving(here) == ["rollout-0", "rollout-1"]


async def test_left_to_itself_nothing_is_grouped_with_a_trainer_without_a_gpu() -> None:
    engine = Engine("rollout-0")
    engine.devices = ("GPU 1",)
    async with world(engine, version=None, transport="auto") as here:
        here.trainer.answers[PublishRequest] = lambda request: msgspec.structs.replace(published(request), device="cpu")
        for version in (0, 1):
            await publish(here, version)
        assert asked(here) == [(0, True, 0), (1, True, 0)]


async def test_an_engine_that_joins_takes_the_store_and_then_a_place_in_a_new_group() -> None:
    first, late = Engine("rollout-0"), Engine("rollout-1")
    async with world(first, version=0, transport="nccl") as here, joining(here):
        await publish(here, 1)
        await here.join(late)
        await until_serving(here, "rollout-0", "rollout-1")
        assert late.syncs == [1]
        await publish(here, 2)
        assert asked(here) == [(0, True, 0), (1, False, 2), (1, True, 0), (2, False, 3)]
        assert [place.generation for place in first.places] == [1, 2]
        assert [place.generation for place in late.places] == [2]
        assert serving(here) == ["rollout-0", "rollout-1"]


async def test_a_joiner_whose_version_the_trainer_has_no_more_waits_for_the_next_one() -> None:
    first, late = Engine("rollout-0"), Engine("rollout-1")
    gone = ErrorReply(reason="VersionNotHeld", message="version 1 is gone", exit_code=75, recoverable=True)
    async with world(first, version=0, transport="nccl") as here, joining(here):
        await publish(here, 1)
        here.trainer.answers[PublishRequest] = lambda request: gone if request.version == 1 else published(request)
        await here.join(late)
        while asked(here)[-1] != (1, True, 0):
            await here.members.wait(0.02)
        assert serving(here) == ["rollout-0"]
        await publish(here, 2)
        await until_serving(here, "rollout-0", "rollout-1")
        assert asked(here)[-1] == (2, True, 2), "one broadcast, and the store for the joiner"
        assert late.syncs == [2]


@pytest.mark.parametrize("how", ["refuses", "has other bytes", "dies"])
async def test_a_group_that_fails_for_one_engine_ends_and_the_store_serves_that_engine(how: str) -> None:
    good, bad = Engine("rollout-0"), Engine("rollout-1")
    async with world(good, bad, version=0, transport="nccl") as here:
        if how == "refuses":
            bad.refusal = ErrorReply(reason="WeightsNotApplied", message="the swap failed")
        elif how == "has other bytes":
            bad.digest = "other bytes"
        else:
            await bad.stop()
        report = await publish(here, 1)
        assert len(report.replies) == 1
        assert serving(here) == ["rollout-0"]
        (failed,) = [text for _, reason, text in here.events if reason == "WeightGroupFailed"]
        assert failed == "1 of 2 engines took version 1 over group 1. The others take it from the store."
        assert any(reason == "WeightSyncFailed" and "rollout-1" in text for _, reason, text in here.events)
        if how == "dies":
            await publish(here, 2)
            assert asked(here)[-1][2] == 2
        else:
            bad.refusal = bad.digest = None
            async with joining(here):
                await until_serving(here, "rollout-0", "rollout-1")
            await publish(here, 2)
            assert asked(here) == [(0, True, 0), (1, False, 3), (1, True, 0), (2, False, 3)]
        assert good.places[-1].generation == 2


async def test_a_trainer_whose_group_failed_is_asked_to_use_the_store() -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1")]
    async with world(*engines, version=0, transport="nccl") as here, joining(here):

        def broken(request: PublishRequest) -> PublishReply:
            if request.group is None:
                return published(request)
            return PublishReply(
                group_error="Connection closed by peer", meeting_port=5000, device=TRAINER_GPU, seconds=0.1
            )

        here.trainer.answers[PublishRequest] = broken
        for engine in engines:
            engine.refusal = ErrorReply(reason="WeightsNotApplied", message="the swap failed")
        await publish(here, 1)
        for engine in engines:
            engine.refusal = None
        await until_serving(here, "rollout-0", "rollout-1")
        (failed,) = [text for _, reason, text in here.events if reason == "WeightGroupFailed"]
        assert "0 of 2 engines took version 1 over group 1: Connection closed by peer." in failed
        assert asked(here)[-1] == (1, True, 0)


async def test_an_engine_gets_no_prompt_before_its_digest_is_that_of_the_trainer() -> None:
    engine = Engine("rollout-0")
    async with world(engine, version=0, transport="nccl") as here:
        released = asyncio.Event()

        async def late(request: PublishRequest) -> PublishReply:
            await released.wait()
            return published(request)

        here.trainer.answers[PublishRequest] = late
        publishing = asyncio.create_task(publish(here, 1))
        while engine.syncs != [0, 1]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert serving(here) == []
        released.set()
        await publishing
        assert serving(here) == ["rollout-0"]


async def test_groups_that_fail_again_and_again_are_given_up() -> None:
    engine = Engine("rollout-0")
    async with world(engine, version=0, transport="nccl") as here, joining(here):
        for version in (1, 2, 3):
            engine.digest = "other bytes"
            await publish(here, version)
            assert asked(here)[-1][2] == 2
            engine.digest = None
            await until_serving(here, "rollout-0")
        await publish(here, 4)
        assert asked(here)[-1] == (4, True, 0)
        assert serving(here) == ["rollout-0"]
        (given_up,) = [text for _, reason, text in here.events if reason == "WeightGroupsGivenUp"]
        assert "3 groups in a row failed" in given_up
