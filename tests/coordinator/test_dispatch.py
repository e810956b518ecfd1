"""Prompts go out to engines that fail in every way, and each comes back exactly once."""

import asyncio
from collections import Counter

import msgspec
import pytest
from aiohttp import web
from coordinator_helpers import Engine, World, answer, good, groups, heartbeats, prompt, world

from grpo_worker.coordinator import member_client
from grpo_worker.coordinator.dispatch import prompt_seed
from grpo_worker.coordinator.groups import Group, GroupState
from grpo_worker.errors import PeerLostError
from grpo_worker.protocol.messages import GenerateRequest, GroupResult

pytestmark = pytest.mark.asyncio


async def dies_mid_stream(
    engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest
) -> None:
    await engine.write(stream, answer(request.prompts[0], request.sampling.n, engine.version))
    assert http.transport is not None
    http.transport.abort()


async def cut_inside_a_frame(
    engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest
) -> None:
    await stream.write(b"\xff\x00\x00\x00half a frame")


async def hangs(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
    await engine.write(stream, answer(request.prompts[0], request.sampling.n, engine.version))
    await engine.released.wait()


async def answers_twice(
    engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest
) -> None:
    for one in request.prompts * 2:
        await engine.write(stream, answer(one, request.sampling.n, engine.version))
    await engine.end(stream, request)


async def slow(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
    for one in request.prompts:
        await asyncio.sleep(0.02)
        await engine.write(stream, answer(one, request.sampling.n, engine.version))
    await engine.end(stream, request)


async def ends_early(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
    await engine.end(stream, request)


async def aborts(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
    for one in request.prompts:
        result = answer(one, request.sampling.n, engine.version)
        cut = [msgspec.structs.replace(sample, finish_reason="abort") for sample in result.samples]
        await engine.write(stream, msgspec.structs.replace(result, samples=cut))
    await engine.end(stream, request)


async def garbage(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
    await stream.write(b"\x03\x00\x00\x00\xc1\xc1\xc1")


def failing(kind: str, *uids: str, times: int = 1000) -> object:
    """Reports an error for these prompts, so many times."""
    left = Counter(dict.fromkeys(uids, times))

    async def behave(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        for one in request.prompts:
            if left[one.id] > 0:
                left[one.id] -= 1
                await engine.write(stream, GroupResult(id=one.id, samples=[], error="no", error_kind=kind))  # type: ignore[arg-type]
            else:
                await engine.write(stream, answer(one, request.sampling.n, engine.version))
        await engine.end(stream, request)

    return behave


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long an engine that is past its deadline is listened to."""
    monkeypatch.setattr(member_client, "GRACE_SECONDS", 0.1)


async def dispatch(here: World, number: int, *, atomic: bool, **changes: object) -> list[Group]:
    """All groups as they came back; engines keep sending heartbeats meanwhile."""
    done: list[Group] = []
    dispatcher = here.dispatcher(done.append, **changes)
    dispatcher.submit(groups(number), atomic=atomic)
    beats = asyncio.create_task(heartbeats(here))
    try:
        async with asyncio.timeout(20):
            await dispatcher.run(until_idle=True)
    finally:
        beats.cancel()
    assert dispatcher.idle
    return done


def check_samples(group: Group) -> None:
    """The samples are those of this prompt."""
    assert [sample.token_ids.tolist() for sample in group.samples] == [
        [group.prompt.token_ids[0], index, 1] for index in range(2)
    ]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize(
    "behaviours",
    [
        [good],
        [good, good, good],
        [good, dies_mid_stream],
        [good, cut_inside_a_frame],
        [good, hangs],
        [good, answers_twice],
        [good, slow],
        [good, ends_early],
        [good, garbage],
        [dies_mid_stream, slow, answers_twice],
        [good, aborts],
    ],
    ids=lambda behaviours: "+".join(b.__name__ for b in behaviours),
)
async def test_each_prompt_comes_back_exactly_once(behaviours: list, atomic: bool) -> None:
    engines = [Engine(f"rollout-{index}", behaviour) for index, behaviour in enumerate(behaviours)]
    async with world(*engines) as here:
        done = await dispatch(here, 40, atomic=atomic, deadline_seconds=0.3, max_attempts=40)
    assert Counter(group.uid for group in done) == Counter({f"0-{index}": 1 for index in range(40)})
    assert {group.state for group in done} == {GroupState.SCORING}
    for group in done:
        check_samples(group)


async def test_healthy_engines_are_asked_for_each_prompt_once() -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1")]
    async with world(*engines) as here:
        await dispatch(here, 40, atomic=False)
    assert Counter(engines[0].asked + engines[1].asked) == Counter({f"0-{index}": 1 for index in range(40)})
    assert all(engine.asked for engine in engines)


async def test_an_answered_prompt_of_an_engine_that_died_is_not_asked_for_again() -> None:
    dying, healthy = Engine("rollout-0", dies_mid_stream), Engine("rollout-1")
    async with world(dying, healthy) as here:
        await dispatch(here, 16, atomic=True, max_attempts=20)
        asked = Counter(dying.asked + healthy.asked)
        assert all(asked[uid] == 1 for uid in [dying.answered[0], *healthy.answered[:8]])
        assert "RolloutLost" in here.reasons()
        assert any("rollout-0" in message for _, _, message in here.events)


async def test_an_atomic_batch_is_one_even_request_an_engine() -> None:
    engines = [Engine(f"rollout-{index}") for index in range(3)]
    async with world(*engines) as here:
        await dispatch(here, 10, atomic=True)
    assert [[len(request.prompts) for request in engine.requests] for engine in engines] == [[4], [4], [2]]
    assert all(request.atomic for engine in engines for request in engine.requests)
    assert engines[0].asked + engines[1].asked + engines[2].asked == [f"0-{index}" for index in range(10)]


async def test_a_prompt_that_fails_once_is_sent_again() -> None:
    engine = Engine("rollout-0", failing("engine", "0-3", times=1))  # type: ignore[arg-type]
    async with world(engine) as here:
        done = await dispatch(here, 8, atomic=True)
    assert {group.state for group in done} == {GroupState.SCORING}
    assert engine.asked.count("0-3") == 2


async def test_a_prompt_that_always_fails_is_a_failed_group_with_its_reason() -> None:
    engine = Engine("rollout-0", failing("engine", "0-3"))  # type: ignore[arg-type]
    async with world(engine) as here:
        done = await dispatch(here, 8, atomic=True, max_attempts=3)
        failed = {group.uid: group for group in done if group.state is GroupState.FAILED}
        assert failed.keys() == {"0-3"}
        assert engine.asked.count("0-3") == 3
        assert failed["0-3"].failure == "rollout-0: no"
        assert any(reason == "PromptFailed" and "0-3" in message for _, reason, message in here.events)


@pytest.mark.parametrize("kind", ["prompt_too_long", "token_out_of_range"])
async def test_what_cannot_get_better_is_not_tried_again(kind: str) -> None:
    engine = Engine("rollout-0", failing(kind, "0-3"))  # type: ignore[arg-type]
    async with world(engine) as here:
        done = await dispatch(here, 8, atomic=True)
    assert engine.asked.count("0-3") == 1
    assert [group.uid for group in done if group.state is GroupState.FAILED] == ["0-3"]


async def test_an_engine_that_only_hangs_costs_a_prompt_its_attempts_and_no_more() -> None:
    async def silent(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        await engine.released.wait()

    engine = Engine("rollout-0", silent)
    async with world(engine) as here:
        done = await dispatch(here, 2, atomic=True, deadline_seconds=0.1, max_attempts=2)
    assert [group.state for group in done] == [GroupState.FAILED] * 2
    assert all("rollout-0" in group.failure for group in done)
    assert all(group.attempts == 2 for group in done)


async def test_no_engine_in_service_is_an_error_after_the_limit() -> None:
    async with world() as here:
        dispatcher = here.dispatcher(lambda group: None, no_engine_timeout_seconds=0.2)
        dispatcher.submit(groups(3), atomic=True)
        with pytest.raises(PeerLostError, match=r"3 prompts.*waited"):
            async with asyncio.timeout(10):
                await dispatcher.run()


async def test_prompts_wait_for_an_engine_that_joins_late() -> None:
    late = Engine("rollout-0")
    async with world() as here:
        done: list[Group] = []
        dispatcher = here.dispatcher(done.append)
        dispatcher.submit(groups(3), atomic=True)
        running = asyncio.create_task(dispatcher.run(until_idle=True))
        await here.join(late)
        joining = asyncio.create_task(here.weights.join_forever())
        async with asyncio.timeout(10):
            await running
        joining.cancel()
    assert len(done) == 3
    assert late.log[0] == "weights 0"


async def test_a_request_names_the_weights_that_it_needs() -> None:
    engine = Engine("rollout-0")
    async with world(engine, version=4) as here:
        done = await dispatch(here, 2, atomic=True)
    assert engine.requests[0].min_weight_version == 4
    assert {group.oldest_version for group in done} == {4}


async def test_a_seed_depends_on_the_prompt_alone() -> None:
    engine, other = Engine("rollout-0"), Engine("rollout-1")
    async with world(engine) as here:
        await dispatch(here, 4, atomic=True)
    async with world(engine, other) as here:
        await dispatch(here, 4, atomic=False)
    seeds = {(one.id, one.seed) for served in (engine, other) for request in served.requests for one in request.prompts}
    assert len(seeds) == 4
    assert all(seed == prompt_seed(1, uid, "train") for uid, seed in seeds)
    assert prompt_seed(1, prompt(0).uid, "train") != prompt_seed(1, prompt(0).uid, "validation")


async def test_without_a_seed_the_engine_draws_its_own() -> None:
    engine = Engine("rollout-0")
    async with world(engine) as here:
        await dispatch(here, 1, atomic=True, seed=None)
    assert engine.requests[0].prompts[0].seed is None


async def test_redispatched_prompts_are_counted() -> None:
    engine = Engine("rollout-0", failing("engine", "0-0", "0-1", times=1))  # type: ignore[arg-type]
    async with world(engine) as here:
        done: list[Group] = []
        dispatcher = here.dispatcher(done.append)
        dispatcher.submit(groups(4), atomic=True)
        async with asyncio.timeout(10):
            await dispatcher.run(until_idle=True)
    assert dispatcher.redispatched == 2
