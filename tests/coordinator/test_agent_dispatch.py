"""Agents that work, raise, hang and block, on engines that are lost: every prompt comes back once, and nothing waits for ever."""

import asyncio
import copy
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from coordinator_helpers import Engine, World, good, groups, heartbeats, prompt, world
from transformers import PreTrainedTokenizerBase

from grpo_worker.coordinator import dispatch, member_client, weight_sync
from grpo_worker.coordinator.agents import Episode, dispatcher
from grpo_worker.coordinator.agents.dispatcher import AgentDispatcher, AgentSetup, turn_seed
from grpo_worker.coordinator.agents.load import Agent, load_agent
from grpo_worker.coordinator.agents.thread import AgentRuntime
from grpo_worker.coordinator.groups import Group, GroupState
from grpo_worker.errors import DataError, PeerLostError
from grpo_worker.protocol.messages import GenerateRequest, GroupResult

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_client, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(weight_sync, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(dispatch, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(dispatcher, "BLOCKED_SECONDS", 0.4)
    monkeypatch.setattr(dispatcher, "PATIENCE_SECONDS", 0.3)


async def two_turns(episode: Episode) -> None:
    """The engine's turns are three tokens: [first of the prompt, 0, 1]."""
    await episode.generate(max_tokens=3)
    episode.observe([9, 9])
    await episode.generate(max_tokens=3)


@asynccontextmanager
async def dispatching(
    here: World, tokenizer: PreTrainedTokenizerBase, agent: Agent, done: list[Group], **changes: Any
) -> AsyncIterator[AgentDispatcher]:
    """A dispatcher, with heartbeats beside it."""
    runtime = AgentRuntime(tokenizer)
    setup = AgentSetup("my_agents.py:agent", agent, runtime, 100)
    beats = asyncio.create_task(heartbeats(here))
    options = here.options(**changes)
    try:
        yield AgentDispatcher(here.client, here.members, here.weights, here.emit, options, setup, done.append)
    finally:
        beats.cancel()
        runtime.close()


async def play(
    here: World, tokenizer: PreTrainedTokenizerBase, agent: Agent, number: int, **changes: Any
) -> list[Group]:
    done: list[Group] = []
    async with dispatching(here, tokenizer, agent, done, **changes) as made:
        made.submit(groups(number), atomic=True)
        async with asyncio.timeout(20):
            await made.run(until_idle=True)
        assert made.idle
    return done


def check(done: list[Group], number: int) -> None:
    assert Counter(group.uid for group in done) == Counter({f"0-{index}": 1 for index in range(number)})
    for group in done:
        assert group.state is GroupState.SCORING, group.failure
        first = group.prompt.token_ids[0]
        assert [sample.token_ids.tolist() for sample in group.samples] == [[first, 0, 1, 9, 9, first, 0, 1]] * 2
        assert all(sample.sampled.tolist() == [True] * 3 + [False] * 2 + [True] * 3 for sample in group.samples)
        assert all(sample.log_probs.tolist()[3:5] == [0.0, 0.0] for sample in group.samples)


async def test_each_prompt_comes_back_once_with_all_of_its_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    engines = [Engine("rollout-0"), Engine("rollout-1")]
    async with world(*engines) as here:
        check(await play(here, tokenizer, two_turns, 12), 12)
    assert all(engine.requests for engine in engines)
    requests = [request for engine in engines for request in engine.requests]
    assert len(requests) == 12 * 2 * 2
    assert all(request.sampling.n == 1 and not request.atomic for request in requests)
    assert {request.min_weight_version for request in requests} == {0}


async def test_a_turn_carries_all_tokens_so_far_and_a_seed_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Engine("rollout-0")
    async with world(engine) as here:
        await play(here, tokenizer, two_turns, 1)
    sent = [request.prompts[0] for request in engine.requests]
    assert sorted(one.token_ids.numpy().tolist() for one in sent) == [[10, 7]] * 2 + [[10, 7, 10, 0, 1, 9, 9]] * 2
    expected = {turn_seed(1, "0-0", "train", sample, turn) for sample in range(2) for turn in range(2)}
    assert {one.seed for one in sent} == expected and len(expected) == 4
    assert turn_seed(1, prompt(0).uid, "train", 0, 0) != turn_seed(1, prompt(0).uid, "validation", 0, 0)


async def test_an_episode_stays_with_its_engine(tokenizer: PreTrainedTokenizerBase) -> None:
    engines = [Engine(f"rollout-{index}") for index in range(3)]
    async with world(*engines) as here:
        await play(here, tokenizer, two_turns, 12)
    for engine in engines:
        assert set(Counter(engine.asked).values()) == {4}, "all turns of all samples of a prompt"


async def dies_at_the_second_turn(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:  # fmt: skip
    if len(request.prompts[0].token_ids.numpy()) > 2:
        assert http.transport is not None
        http.transport.abort()
        return
    await good(engine, stream, http, request)


async def test_a_lost_turn_goes_to_another_engine_with_the_same_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    dying, healthy = Engine("rollout-0", dies_at_the_second_turn), Engine("rollout-1")
    async with world(dying, healthy) as here:
        check(await play(here, tokenizer, two_turns, 6, max_attempts=40), 6)
        assert "RolloutLost" in here.reasons()
    lost = {(r.prompts[0].id, r.prompts[0].seed) for r in dying.requests if len(r.prompts[0].token_ids.numpy()) > 2}
    assert lost <= {(r.prompts[0].id, r.prompts[0].seed) for r in healthy.requests}


async def test_a_turn_that_no_engine_answers_fails_its_group_after_the_last_attempt(tokenizer: PreTrainedTokenizerBase) -> None:  # fmt: skip
    async def refuses(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        await engine.write(stream, GroupResult(id=request.prompts[0].id, samples=[], error="no", error_kind="engine"))
        await engine.end(stream, request)

    async def swallows(episode: Episode) -> None:
        try:
            await episode.generate()
        except PeerLostError:
            pass

    engine = Engine("rollout-0", refuses)
    async with world(engine) as here:
        for agent in (two_turns, swallows):
            done = await play(here, tokenizer, agent, 1)
            assert [group.state for group in done] == [GroupState.FAILED]
            assert "rollout-0: no" in done[0].failure
    assert max(Counter(request.prompts[0].seed for request in engine.requests).values()) == 2 * 3


@pytest.mark.parametrize("poison", [True, False])
async def test_an_engine_that_dies_costs_no_group_but_the_one_that_kills_it(tokenizer: PreTrainedTokenizerBase, poison: bool) -> None:  # fmt: skip
    left = 3

    async def dies(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
        nonlocal left
        if request.prompts[0].id == "0-1" if poison else left > 0:
            left -= 1
            engine.restart()
            assert http.transport is not None
            http.transport.abort()
            return
        await good(engine, stream, http, request)

    async with world(Engine("rollout-0", dies)) as here:
        joining = asyncio.create_task(here.weights.join_forever())
        done = await play(here, tokenizer, two_turns, 4, max_attempts=1, deadline_seconds=20.0)
        joining.cancel()
        await asyncio.gather(joining, return_exceptions=True)
    failed = {group.uid: group.failure for group in done if group.state is GroupState.FAILED}
    assert len(done) == 4
    assert failed.keys() == ({"0-1"} if poison else set())
    assert not poison or "at last while they had nothing else" in failed["0-1"]


def raises_for(uid: str) -> Agent:
    async def agent(episode: Episode) -> None:
        await two_turns(episode)
        if episode.prompt.uid == uid:
            raise KeyError("no such tool")

    return agent


async def test_an_exception_fails_its_group_alone_and_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    async with world(Engine("rollout-0")) as here:
        done = await play(here, tokenizer, raises_for("0-2"), 4)
        told = [message for _, reason, message in here.events if reason == "PromptFailed"]
    failed = {group.uid: group for group in done if group.state is GroupState.FAILED}
    assert len(done) == 4 and failed.keys() == {"0-2"}
    assert failed["0-2"].attempts == 1, "what a person's code raises is not tried again"
    assert len(told) == 1
    for word in ("prompt 0-2", "rollout.agent: 'my_agents.py:agent'", "in agent", "KeyError: 'no such tool'"):
        assert word in told[0]


@pytest.mark.parametrize("in_a_task", [False, True])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
async def test_nothing_that_an_agent_raises_ends_the_thread(
    tokenizer: PreTrainedTokenizerBase, error: type[BaseException], in_a_task: bool
) -> None:
    async def leave() -> None:
        raise error

    async def agent(episode: Episode) -> None:
        await two_turns(episode)
        if episode.prompt.uid == "0-0":
            await (asyncio.create_task(leave()) if in_a_task else leave())

    async with world(Engine("rollout-0")) as here:
        done = await play(here, tokenizer, agent, 3)
    assert Counter(group.state for group in done) == {GroupState.FAILED: 1, GroupState.SCORING: 2}


async def test_an_episode_without_a_turn_fails_its_group(tokenizer: PreTrainedTokenizerBase) -> None:
    async def agent(episode: Episode) -> None:
        episode.observe([5])

    async with world(Engine("rollout-0")) as here:
        done = await play(here, tokenizer, agent, 1)
    assert "without one sampled token" in done[0].failure


async def test_a_hung_agent_is_given_up_at_its_deadline_and_the_others_go_on(tokenizer: PreTrainedTokenizerBase) -> None:  # fmt: skip
    async def agent(episode: Episode) -> None:
        await two_turns(episode)
        for _ in range(3 * (episode.prompt.uid == "0-1")):
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue  # it does not take a hint

    async with world(Engine("rollout-0")) as here:
        done = await play(here, tokenizer, agent, 3, deadline_seconds=0.8, max_attempts=2)
    failed = [group for group in done if group.state is GroupState.FAILED]
    assert len(done) == 3 and [group.uid for group in failed] == ["0-1"]
    assert failed[0].attempts == 2
    assert "did not end within 0.8 s (rollout.requestTimeoutSeconds)" in failed[0].failure


@pytest.mark.parametrize("in_a_task", [False, True])
async def test_a_blocking_agent_is_left_behind_and_the_others_go_on(
    tokenizer: PreTrainedTokenizerBase, in_a_task: bool
) -> None:
    async def block() -> None:
        threading.Event().wait(10)

    async def agent(episode: Episode) -> None:
        await two_turns(episode)
        if episode.prompt.uid == "0-1":
            await (asyncio.create_task(block()) if in_a_task else block())

    async with world(Engine("rollout-0")) as here:
        late: list[float] = []
        watching = asyncio.create_task(lateness(late))
        started = time.monotonic()
        done = await play(here, tokenizer, agent, 4, deadline_seconds=1.0)
        watching.cancel()
    assert time.monotonic() - started < 8, "nobody waited for it"
    assert max(late) < 0.5, "the coordinator's own loop went on"
    failed = {group.uid: group for group in done if group.state is GroupState.FAILED}
    assert len(done) == 4 and failed.keys() == {"0-1"}
    for word in ("blocked the agents' event loop", "asyncio.to_thread", "in block"):
        assert word in failed["0-1"].failure


async def lateness(late: list[float]) -> None:
    """By how much the event loop of the test, which is the coordinator's, wakes late."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.02)
        late.append(time.monotonic() - before - 0.02)


async def test_no_more_episodes_run_than_the_engines_have_places(tokenizer: PreTrainedTokenizerBase) -> None:
    running: list[int] = [0, 0]

    async def agent(episode: Episode) -> None:
        running[0] += 1
        running[1] = max(running)
        await two_turns(episode)
        running[0] -= 1

    async with world(Engine("rollout-0"), Engine("rollout-1")) as here:
        check(await play(here, tokenizer, agent, 12, max_num_seqs=3), 12)
    assert 2 <= running[1] <= 6


async def test_episodes_wait_for_an_engine_that_joins_late(tokenizer: PreTrainedTokenizerBase) -> None:
    done: list[Group] = []
    async with world() as here, dispatching(here, tokenizer, two_turns, done) as made:
        made.submit(groups(3), atomic=True)
        running = asyncio.create_task(made.run(until_idle=True))
        await here.join(Engine("rollout-0"))
        joining = asyncio.create_task(here.weights.join_forever())
        async with asyncio.timeout(10):
            await running
        joining.cancel()
    check(done, 3)


async def test_no_engine_in_service_is_an_error_after_the_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    async with world() as here, dispatching(here, tokenizer, two_turns, [], no_engine_timeout_seconds=0.2) as made:
        made.submit(groups(3), atomic=True)
        with pytest.raises(PeerLostError, match="3 prompts waited"):
            async with asyncio.timeout(10):
                await made.run()


async def test_a_run_that_ends_leaves_no_episode_behind(tokenizer: PreTrainedTokenizerBase) -> None:
    cancelled: list[str] = []
    begun = asyncio.Event()
    here_loop = asyncio.get_running_loop()

    async def agent(episode: Episode) -> None:
        await episode.generate()
        here_loop.call_soon_threadsafe(begun.set)
        try:
            await asyncio.sleep(1000)
        finally:
            cancelled.append(episode.prompt.uid)

    async with world(Engine("rollout-0")) as here, dispatching(here, tokenizer, agent, []) as made:
        made.submit(groups(1), atomic=True)
        running = asyncio.create_task(made.run())
        async with asyncio.timeout(10):
            await begun.wait()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            while not cancelled:
                await asyncio.sleep(0.01)


AGENTS = """
async def agent(episode, *, tool="none", depth=1):
    episode.seen = (tool, depth)

def plain(episode):
    pass

async def no_episode():
    pass

class Player:
    async def __call__(self, episode):
        pass

player = Player()
"""


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("agents", {}, ["rollout.agent", "no function 'agents'", "Did you mean 'agent'?"]),
        ("plain", {}, ["rollout.agent", "not async"]),
        ("Player", {}, ["rollout.agent", "not async"]),
        ("no_episode", {}, ["rollout.agent", "cannot be called", "async def agent(episode)"]),
        ("agent", {"tol": "calculator"}, ["rollout.agentOptions.tol", "no such option", "Did you mean 'tool'?"]),
    ],
)
async def test_an_agent_that_cannot_work_is_refused(
    tmp_path: Path, function: str, options: dict[str, Any], words: list[str]
) -> None:
    (tmp_path / "agents_that_fail.py").write_text(AGENTS)
    with pytest.raises(DataError) as refused:
        load_agent(f"{tmp_path}/agents_that_fail.py:{function}", options)
    assert all(word in str(refused.value) for word in words), refused.value


async def test_options_are_keyword_arguments(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "agents_that_work.py").write_text(AGENTS)

    async def never(request: object) -> Any:
        raise AssertionError

    episode: Any = Episode(prompt(0), copy.copy(tokenizer), max_response_tokens=8, max_model_tokens=8, ask=never)
    await load_agent(f"{tmp_path}/agents_that_work.py:agent", {"tool": "calculator"})(episode)
    assert episode.seen == ("calculator", 1)
    await load_agent(f"{tmp_path}/agents_that_work.py:player", {})(episode)
