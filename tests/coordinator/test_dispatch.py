"""Prompts go out to engines that fail in every way, and each comes back exactly once."""

import asyncio
from collections import Counter

import msgspec
import numpy as np
import pytest
from aiohttp import web
from coordinator_helpers import Engine, World, answer, good, groups, heartbeats, prompt, world

from grpo_worker.coordinator import member_client, weight_sync
from grpo_worker.coordinator.dispatch import prompt_seed
from grpo_worker.coordinator.groups import Group, GroupState
from grpo_worker.errors import PeerLostError
from grpo_worker.protocol.messages import Array, GenerateRequest, GroupResult

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


def dying(*poison: str, times: int = 0) -> object:
    """The process dies, so many times in the middle of its work, and whenever it has one of these prompts; it comes back without weights."""
    left = times

    async def behave(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        nonlocal left
        has = any(one.id in poison for one in request.prompts)
        if left > 0 or has:
            left -= not has
            engine.restart()
            assert http.transport is not None
            http.transport.abort()
            return
        await good(engine, stream, http, request)

    return behave


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
    monkeypatch.setattr(weight_sync, "RETRY_SECONDS", 0.02)


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


async def with_restarts(here: World, number: int, *, atomic: bool, **changes: object) -> list[Group]:
    """As `dispatch`, with engines that are given weights when they come back."""
    joining = asyncio.create_task(here.weights.join_forever())
    try:
        return await dispatch(here, number, atomic=atomic, **changes)
    finally:
        joining.cancel()
        await asyncio.gather(joining, return_exceptions=True)


@pytest.mark.parametrize("atomic", [True, False])
async def test_preemptions_of_the_only_engine_lose_no_prompt(atomic: bool) -> None:
    engine = Engine("rollout-0", dying(times=3))  # type: ignore[arg-type]
    async with world(engine) as here:
        done = await with_restarts(here, 32, atomic=atomic, max_num_seqs=64)
    assert engine.instance == "first+++"
    assert len(done) == 32
    assert {group.state for group in done} == {GroupState.SCORING}
    assert {group.attempts for group in done} == {0}


@pytest.mark.parametrize("engines", [1, 2])
async def test_a_prompt_that_kills_its_engines_is_found_and_costs_no_other(engines: int) -> None:
    staff = [Engine(f"rollout-{index}", dying("0-5")) for index in range(engines)]  # type: ignore[arg-type]
    async with world(*staff) as here:
        done = await with_restarts(here, 32, atomic=True)
        told = [message for _, reason, message in here.events if reason == "PromptFailed"]
    failed = {group.uid: group for group in done if group.state is GroupState.FAILED}
    assert len(done) == 32
    assert failed.keys() == {"0-5"}
    deaths = sum(engine.instance.count("+") for engine in staff)
    assert deaths == 4, "twice in company, then twice alone"
    assert len(told) == 1
    assert "Engines died 4 times while they had this prompt" in told[0]
    assert "at last while they had nothing else" in told[0]
    last = [
        request.prompts for engine in staff for request in engine.requests if "0-5" in [p.id for p in request.prompts]
    ][-1]
    assert [one.id for one in last] == ["0-5"]


async def test_a_server_that_says_that_its_engine_died_at_work_convicts_a_lonely_prompt_at_once() -> None:
    """Three deaths: what failurePolicy.maxRestarts allows by default."""

    async def dies(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        if "0-5" in [one.id for one in request.prompts]:
            for one in request.prompts:
                await engine.write(stream, GroupResult(id=one.id, samples=[], error="gone", error_kind="engine_dead"))
            engine.restart()
            await engine.end(stream, request)
            return
        await good(engine, stream, http, request)

    engine = Engine("rollout-0", dies)
    async with world(engine) as here:
        done = await with_restarts(here, 16, atomic=True)
    assert [group.uid for group in done if group.state is GroupState.FAILED] == ["0-5"]
    assert engine.instance == "first+++"


async def test_an_engine_that_takes_leave_or_falls_silent_says_nothing_of_its_prompts() -> None:
    async def leaves(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        if len(engine.requests) > 6:
            await good(engine, stream, http, request)
            return
        engine.state, engine.terminating = "failed", engine.name
        here.beat()
        assert http.transport is not None
        http.transport.abort()
        asyncio.get_running_loop().call_later(0.3, back, engine)  # long after the cut was seen

    def back(engine: Engine) -> None:
        engine.state, engine.terminating = "ready", ""

    async with world(Engine("rollout-0", leaves)) as here:
        done = await dispatch(here, 8, atomic=True, max_attempts=1)
    assert {(group.state, group.attempts, len(group.misfortunes)) for group in done} == {(GroupState.SCORING, 0, 0)}


async def test_a_prompt_that_is_late_alone_answers_for_it_and_those_that_are_late_together_do_not() -> None:
    async def late(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        for one in request.prompts:
            if one.id == "0-3" or (len(engine.requests) == 1 and one.id == "0-4"):
                await engine.write(stream, GroupResult(id=one.id, samples=[], error="late", error_kind="deadline"))
            else:
                await engine.write(stream, answer(one, request.sampling.n, engine.version))
        await engine.end(stream, request)

    async with world(Engine("rollout-0", late)) as here:
        done = await dispatch(here, 8, atomic=True, max_attempts=2)
    groups_by_uid = {group.uid: group for group in done}
    assert (groups_by_uid["0-4"].state, groups_by_uid["0-4"].attempts) == (GroupState.SCORING, 0)
    assert (groups_by_uid["0-3"].state, groups_by_uid["0-3"].attempts) == (GroupState.FAILED, 2)


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
        running = asyncio.create_task(dispatcher.run())
        await asyncio.sleep(0)
        assert [wait.what for wait in here.members._waits] == ["a rollout server in service, for 3 prompts"]
        with pytest.raises(PeerLostError, match=r"3 prompts.*waited"):
            async with asyncio.timeout(10):
                await running
    assert here.members.waits() == []


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


@pytest.mark.parametrize(("one_in", "least", "most"), [(1, 64, 64), (8, 2, 20), (0, 0, 0)])
async def test_log_probs_are_asked_for_where_somebody_reads_them(one_in: int, least: int, most: int) -> None:
    engine = Engine("rollout-0")
    async with world(engine) as here:
        await dispatch(here, 64, atomic=True, log_probs_one_in=one_in)
        again = [here.options(log_probs_one_in=one_in).wants_log_probs(prompt(index).uid) for index in range(64)]
    asked = {one.id: one.log_probs for request in engine.requests for one in request.prompts}
    assert least <= sum(asked.values()) <= most
    assert [asked[prompt(index).uid] for index in range(64)] == again


async def test_samples_without_log_probs_are_marked_as_such() -> None:
    async def without(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        for one in request.prompts:
            result = answer(one, request.sampling.n, engine.version)
            samples = [msgspec.structs.replace(sample, log_probs=Array.of([], "float32")) for sample in result.samples]
            await engine.write(stream, msgspec.structs.replace(result, samples=samples))
        await engine.end(stream, request)

    async with world(Engine("rollout-0", without)) as here:
        (group,) = await dispatch(here, 1, atomic=True)
    for sample in group.samples:
        assert sample.log_probs.shape == sample.token_ids.shape
        assert np.isnan(sample.log_probs).all()


async def test_redispatched_prompts_are_counted() -> None:
    engine = Engine("rollout-0", failing("engine", "0-0", "0-1", times=1))  # type: ignore[arg-type]
    async with world(engine) as here:
        done: list[Group] = []
        dispatcher = here.dispatcher(done.append)
        dispatcher.submit(groups(4), atomic=True)
        async with asyncio.timeout(10):
            await dispatcher.run(until_idle=True)
    assert dispatcher.redispatched == 2
