"""A request to a member ends with its answer, its own words, or the news that it is lost: whoever asks, and at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from coordinator_helpers import Engine, World, groups, heartbeats, world

from grpo_worker.coordinator import members
from grpo_worker.coordinator.dispatch import prompt_request
from grpo_worker.coordinator.groups import Group
from grpo_worker.coordinator.member_client import MemberClient
from grpo_worker.coordinator.members import SilentError
from grpo_worker.errors import ExitCode, PeerLostError
from grpo_worker.protocol.http import RefusedError
from grpo_worker.protocol.messages import (
    ApplyWeightsReply,
    ApplyWeightsRequest,
    GenerateRequest,
    PublishReply,
    PublishRequest,
    StoreSource,
)

pytestmark = pytest.mark.asyncio

SOURCE = StoreSource(host="h", port=1, version=1, digest="d", total_bytes=1)
APPLY = ApplyWeightsRequest(version=1, store=SOURCE, timeout_seconds=60)


async def hangs(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
    await engine.released.wait()


async def generate(here: World) -> object:
    engine, done = here.members.alive("rollout")[0], list[Group]()
    dispatcher = here.dispatcher(done.append)
    return await here.client.generate(engine, await request_of(dispatcher), lambda result: None)


async def request_of(dispatcher: object) -> GenerateRequest:
    options = dispatcher._options  # type: ignore[attr-defined]
    prompts = [prompt_request(options, group) for group in groups(2)]
    return GenerateRequest(request_id="r", prompts=prompts, sampling=options.sampling, deadline_seconds=60.0)


async def sync(here: World) -> object:
    engine = here.members.alive("rollout")[0]
    return await here.client.ask(engine, "/v1/weights", APPLY, ApplyWeightsReply, 60.0, "the sync of version 1")


async def publish(here: World) -> object:
    trainer = here.members.alive("trainer")[0]
    return await here.client.ask(trainer, "/v1/trainer", PublishRequest(version=1), PublishReply, 60.0, "publish")


Ask = Callable[[World], Awaitable[object]]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often a clock that a test pushes is looked at."""
    monkeypatch.setattr(members, "WATCH_SECONDS", 0.02)


ASKS = [(generate, "generation of 2 prompts", "rollout-0"), (sync, "the sync of version 1", "rollout-0"), (publish, "publish", "trainer-0")]  # fmt: skip


async def never(*_: object) -> bytes:
    await asyncio.get_running_loop().create_future()
    return b""


def stuck(here: World) -> None:
    """Nobody answers any more."""
    here.trainer.answers[PublishRequest] = never
    for engine in here.engines:
        engine.behaviour, engine.hang_at_sync = hangs, True


@pytest.mark.parametrize(("ask", "what", "name"), ASKS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_silent_member_loses_its_request_at_its_limit_and_not_before(ask: Ask, what: str, name: str) -> None:
    async with world(Engine("rollout-0")) as here:
        stuck(here)
        call = asyncio.ensure_future(ask(here))
        await asyncio.sleep(0.1)
        for here.clock.pushed in (10.0, 20.0, 25.0):
            await asyncio.sleep(0.1)
        assert not call.done()
        assert [event for event in here.events if event[1] == "MemberSilent"] == [
            (
                "warning",
                "MemberSilent",
                f"{name} has been silent for 10 s and is lost after 30 s; what waits for it: {what}",
            )
        ], "told once, and in the status:"
        assert any(name in wait and what in wait for wait in here.members.waits())
        here.clock.pushed = 31.0
        started = time.monotonic()
        with pytest.raises(
            SilentError, match=rf"{name} was silent for 3\d s \(network.memberTimeoutSeconds\) during {what}"
        ):
            await call
        assert time.monotonic() - started < 2.0
        assert here.members.waits() == []


@pytest.mark.parametrize(("ask", "what", "name"), ASKS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_member_that_was_started_again_has_lost_its_request(ask: Ask, what: str, name: str) -> None:
    async with world(Engine("rollout-0")) as here:
        stuck(here)
        call = asyncio.ensure_future(ask(here))
        await asyncio.sleep(0.05)
        for one in (*here.engines, here.trainer):
            one.instance = "second"
        here.beat()
        with pytest.raises(PeerLostError, match=f"{name} was started again during {what}"):
            async with asyncio.timeout(5):
                await call


@pytest.mark.parametrize(("ask", "what", "name"), ASKS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_wrong_token_is_named_whoever_refuses_it(ask: Ask, what: str, name: str) -> None:
    async with world(Engine("rollout-0")) as here:
        here.client = MemberClient(here.session, here.members, "another")
        with pytest.raises(RefusedError, match=f"{name} refused {what}: the job's token is missing or wrong") as caught:
            await ask(here)
    assert (caught.value.status, caught.value.reply.reason) == (401, "Unauthorized")
    assert caught.value.reply.exit_code == ExitCode.CONFIG


async def test_a_member_that_is_heard_of_again_is_told() -> None:
    async with world(Engine("rollout-0")) as here:
        stuck(here)
        call = asyncio.ensure_future(sync(here))
        await asyncio.sleep(0.05)
        here.clock.pushed = 12.0
        await asyncio.sleep(0.1)
        here.beat()
        beats = asyncio.create_task(heartbeats(here))
        assert ("info", "MemberHeard", "rollout-0 is heard of again after 12 s") in here.events
        await asyncio.sleep(0.1)
        assert not call.done(), "it lives: its request goes on"
        assert here.members.waits() == []
        call.cancel()
        beats.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_a_coordinator_that_stood_still_reads_its_heartbeats_before_it_judges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped and continued, say, for longer than the limit."""
    monkeypatch.setattr(members, "WATCH_SECONDS", 0.2)
    async with world(Engine("rollout-0")) as here:
        stuck(here)
        call = asyncio.ensure_future(sync(here))
        await asyncio.sleep(0.05)
        here.clock.pushed = 100.0
        await asyncio.sleep(0.25)  # it has looked, and found everybody silent
        here.beat()
        await asyncio.sleep(0.5)
        assert not call.done()
        assert "MemberSilent" not in here.reasons()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
