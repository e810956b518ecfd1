import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.typedefs import Handler

from grpo_operator.control.reports import CoordinatorSilent, Reports, Target
from grpo_operator.facts import Job, Pod
from grpo_operator.labels import Role
from grpo_operator.token import job_token
from grpo_worker.config.status import GRPOJobStatus

pytestmark = pytest.mark.asyncio

KEY = b"k" * 32
NOW = datetime(2026, 11, 22, tzinfo=UTC)
JOB = Job("demo", "team", "j1", 1, NOW, None, GRPOJobStatus(), {})
POD = Pod("demo-coordinator", "p1", Role.COORDINATOR, 0, 0, NOW, "Running", ip="127.0.0.1")


class Coordinator:
    """Serves `/status` as a worker does."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {"state": "Training", "step": 1, "members": [], "reward": 0.1}
        self.stops = 0
        self.port = 0
        self.delay_seconds = 0.0
        self.body: str | None = None
        self.redirect: str | None = None
        self.visits: list[str] = []

    def app(self) -> web.Application:
        async def status(request: web.Request) -> web.Response:
            if request.headers.get("Authorization") != f"Bearer {job_token(KEY, 'j1')}":
                raise web.HTTPUnauthorized
            await asyncio.sleep(self.delay_seconds)
            if self.redirect is not None:
                raise web.HTTPFound(self.redirect)
            return web.json_response(self.status) if self.body is None else web.Response(text=self.body)

        async def stop(request: web.Request) -> web.Response:
            self.stops += 1
            return web.json_response({"stopping": True})

        @web.middleware
        async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.visits.append(request.path)
            return await handler(request)

        app = web.Application(middlewares=[note])
        app.add_routes([web.get("/status", status), web.post("/v1/stop", stop)])
        return app


@pytest_asyncio.fixture
async def coordinator() -> AsyncIterator[Coordinator]:
    made = Coordinator()
    runner = web.AppRunner(made.app(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.port = runner.addresses[0][1]
    yield made
    await runner.cleanup()


def reports(coordinator: Coordinator, woken: list[Job], key: bytes = KEY, pod: Pod = POD) -> Reports:
    return Reports(
        key, lambda: [Target(JOB, pod, coordinator.port)], woken.append, port_of=lambda job: coordinator.port
    )


async def test_a_job_is_woken_by_news_and_not_by_the_same_again(coordinator: Coordinator):
    woken: list[Job] = []
    async with reports(coordinator, woken) as reading:
        await reading.poll()
        await reading.poll()
        coordinator.status |= {"reward": 0.2}
        await reading.poll()
        assert len(woken) == 1
        newest = reading.newest("j1")
        assert newest is not None and newest.document["reward"] == 0.2 and newest.pod_uid == "p1"
        for change in (
            {"step": 2},
            {"state": "Saving"},
            {"checkpoint": {"step": 2}},
            {"members": [{"name": "rollout-0"}]},
        ):
            coordinator.status |= change
            await reading.poll()
        assert len(woken) == 5


async def test_a_coordinator_that_falls_silent_wakes_the_job_once_and_its_last_word_stays(coordinator: Coordinator):
    woken: list[Job] = []
    async with reports(coordinator, woken, key=b"x" * 32) as reading:
        for _ in range(5):
            await reading.poll()
        assert len(woken) == 1 and reading.newest("j1") is None
    async with reports(coordinator, woken) as reading:
        await reading.poll()
        coordinator.port, port = 1, coordinator.port
        for _ in range(5):
            await reading.poll()
        assert len(woken) == 3 and reading.newest("j1") is not None
        coordinator.port = port
        await reading.poll()
        assert len(woken) == 4, "it is back"


async def test_a_coordinator_that_hangs_costs_two_seconds(coordinator: Coordinator):
    coordinator.delay_seconds = 30
    started = asyncio.get_running_loop().time()
    async with reports(coordinator, []) as reading:
        await reading.poll()
    assert asyncio.get_running_loop().time() - started < 4


@pytest.mark.parametrize(
    "body", ["[" * 100_000, '{"checkpoint": "none"}', '{"members": 3}', "[]", "no JSON", '{"state":' + "[" * 100_000]
)
async def test_an_answer_that_is_no_status_harms_nobody(coordinator: Coordinator, body: str):
    coordinator.body = body
    woken: list[Job] = []
    async with reports(coordinator, woken) as reading:
        await reading.poll()
        assert reading.newest("j1") is None and woken == []
        coordinator.body = '{"state": ["odd"], "members": [1, {"name": {}}]}'
        await reading.poll()
        await reading.poll()
        assert reading.newest("j1") is not None and len(woken) == 1


async def test_a_redirect_is_not_followed(coordinator: Coordinator):
    coordinator.redirect = "/elsewhere"
    async with reports(coordinator, []) as reading:
        await reading.poll()
        assert reading.newest("j1") is None
    assert coordinator.visits == ["/status"]


async def test_a_request_to_stop_reaches_the_coordinator_or_is_said_to_have_failed(coordinator: Coordinator):
    async with reports(coordinator, []) as reading:
        await reading.stop(JOB, POD)
        assert coordinator.stops == 1
        coordinator.port = 1
        with pytest.raises(CoordinatorSilent, match="demo-coordinator"):
            await reading.stop(JOB, replace(POD))
