"""Colocated engines sleep while the trainer works: none of them has memory then, and all of them have the next weights."""

import asyncio

import msgspec
import pytest
from coordinator_helpers import Engine, World, published, sent, world
from test_weight_sync import eager, joining, publish, serving, until_serving

from grpo_worker.protocol.messages import ErrorReply, PublishReply, PublishRequest

pytestmark = pytest.mark.asyncio
__all__ = ["eager"]


def loads(here: World, engine: Engine) -> bool:
    """Whether the coordinator lets the engine take memory, at its next heartbeat."""
    here.members.beat(engine.beat())
    return here.weights.may_load(engine.beat())


async def test_engines_sleep_then_the_trainer_publishes_and_they_wake_with_its_weights() -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1")]
    async with world(*engines, version=0, transport="ipc") as here:
        for version in (1, 2):
            assert await here.weights.rest() == {"memory/generating_measured_gib": 2.0}
            report = await publish(here, version)
            assert [reply.digest for reply in report.replies] == [sent(version)] * 2
            assert serving(here) == ["rollout-0", "rollout-1"]
    for engine in engines:
        assert engine.log == ["weights 0", "sleep", "weights 1", "sleep", "weights 2"]


async def test_each_engine_is_paired_with_the_trainer_ranks_of_its_devices_whoever_else_is_there() -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1"), Engine("rollout-2")]
    async with world(*engines, version=0, transport="ipc", workers_of_an_engine=2) as here:
        await publish(here, 1)
        (senders,) = [call.group for call in here.trainer.calls if call.group]
        assert (senders.rank, senders.world_size, senders.pairs) == (0, 2, (0, 1, 2, 3, 4, 5))
        assert [engine.places[-1].pair for engine in engines] == [0, 2, 4]
        assert {(engine.places[-1].rank, engine.places[-1].world_size) for engine in engines} == {(1, 2)}
        await engines[1].stop()
        here.members.suspect(here.members.alive("rollout")[1])
        await publish(here, 2)
        (senders,) = [call.group for call in here.trainer.calls if call.group and call.version == 2]
        assert senders.pairs == (0, 1, 4, 5)
        assert engines[2].places[-1] == msgspec.structs.replace(senders, rank=1, pair=4, pairs=())


async def test_an_engine_that_has_begun_to_start_is_waited_for_and_sleeps_too() -> None:
    first, late = Engine("rollout-0"), Engine("rollout-1")
    async with world(first, version=0) as here:
        late.state = "starting"
        await here.join(late)
        assert loads(here, late), "it is the engines' turn"
        resting = asyncio.create_task(here.weights.rest())
        await asyncio.sleep(0.1)
        assert not resting.done()
        assert first.log == ["weights 0"], "nobody sleeps before all are up"
        late.state = "ready"
        here.beat()
        await asyncio.wait_for(resting, 5)
        assert (first.log[-1], late.log) == ("sleep", ["sleep"])
        async with joining(here):
            await publish(here, 1)
            await until_serving(here, "rollout-0", "rollout-1")


async def test_an_engine_that_comes_while_the_trainer_works_does_not_load_before_its_turn() -> None:
    first, late = Engine("rollout-0"), Engine("rollout-1")
    async with world(first, version=0) as here, joining(here):
        await asyncio.wait_for(here.weights.rest(), 5)
        late.state = "starting"
        await here.join(late)
        assert not loads(here, late)
        assert loads(here, first) is False, "it was never asked"
        await asyncio.wait_for(here.weights.rest(), 5)  # who does not load is not waited for
        await publish(here, 1)
        assert loads(here, late)


async def test_nobody_joins_while_the_trainer_works() -> None:
    first, late = Engine("rollout-0"), Engine("rollout-1")
    async with world(first, version=0) as here, joining(here):
        await here.weights.rest()
        await here.join(late)
        await asyncio.sleep(0.3)
        assert late.log == []
        assert first.log == ["weights 0", "sleep"]
        await publish(here, 1)
        await until_serving(here, "rollout-0", "rollout-1")


async def test_an_engine_that_cannot_sleep_is_told_of_and_joins_with_the_next_weights() -> None:
    good, bad = Engine("rollout-0"), Engine("rollout-1")
    async with world(good, bad, version=0) as here, joining(here):
        bad.refusal = ErrorReply(reason="EngineDead", message="the engine has failed")
        await here.weights.rest()
        (told,) = [text for _, reason, text in here.events if reason == "EngineAwake"]
        assert "rollout-1" in told
        assert "memory" in told
        bad.refusal = None
        await publish(here, 1)
        await until_serving(here, "rollout-0", "rollout-1")


async def test_an_engine_that_is_lost_while_it_sleeps_costs_the_others_nothing() -> None:
    good, lost = Engine("rollout-0"), Engine("rollout-1")
    async with world(good, lost, version=0, transport="ipc") as here:
        await here.weights.rest()
        lost.restart()
        lost.state = "starting"
        here.beat()
        report = await publish(here, 1)
        assert len(report.replies) == 1
        assert serving(here) == ["rollout-0"]


async def test_a_trainer_that_hands_over_other_bytes_leaves_the_engine_out_until_the_store_serves_it() -> None:
    engine = Engine("rollout-0")
    async with world(engine, version=0, transport="ipc") as here, joining(here):

        def broken(request: PublishRequest) -> PublishReply:
            reply = published(request)
            return msgspec.structs.replace(reply, digest="other") if request.group else reply

        here.trainer.answers[PublishRequest] = broken
        await here.weights.rest()
        await publish(here, 1)
        await until_serving(here, "rollout-0")
        assert [call.store for call in here.trainer.calls if isinstance(call, PublishRequest)] == [True, False, True]
