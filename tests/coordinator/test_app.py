"""The coordinator's port: guarded by the job's token, except for what probes and Prometheus ask."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from coordinator_helpers import TOKEN, Engine, World, world

from grpo_worker.config import Spec
from grpo_worker.coordinator.app import make_app, serve
from grpo_worker.coordinator.progress import Progress
from grpo_worker.errors import ConfigError
from grpo_worker.protocol import codec
from grpo_worker.protocol.auth import authorization
from grpo_worker.protocol.messages import Heartbeat, HeartbeatReply

pytestmark = pytest.mark.asyncio
SPEC = Spec.model_validate({"model": {"path": "m"}, "data": {"trainFiles": ["t"]}, "reward": {"function": "gsm8k"}})


@asynccontextmanager
async def coordinator(here: World, token: str = TOKEN) -> AsyncIterator[tuple[str, list[str]]]:
    """Its URL, and the stop requests that it was sent."""
    stops: list[str] = []
    progress = Progress("job", SPEC, "life", here.members, here.weights)

    def reply(beat: Heartbeat) -> HeartbeatReply:
        return HeartbeatReply(incarnation="life", policy_version=here.weights.version, max_staleness=0)

    runner = await serve(make_app(token, here.members, progress, reply, stops.append), "127.0.0.1", 0)
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}", stops
    finally:
        await runner.cleanup()


GUARDED = [("GET", "/status"), ("POST", "/v1/members"), ("POST", "/v1/stop")]


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("header", [None, "Bearer wrong", TOKEN, f"bearer {TOKEN}", f"Bearer {TOKEN} ", "Bearer "])
async def test_a_request_without_the_token_is_refused(method: str, path: str, header: str | None) -> None:
    async with world() as here, coordinator(here) as (url, stops):
        headers = {} if header is None else {"Authorization": header}
        async with here.session.request(method, url + path, headers=headers) as response:
            refused = response.status == 401
            body = await response.text()
        # Trailing blanks of a header's value are no part of it (RFC 9110, section 5.5).
        assert refused != (header == f"Bearer {TOKEN} ")
        assert TOKEN not in body
        assert not refused or json.loads(body)["reason"] == "Unauthorized"
        assert not refused or stops == []


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
async def test_probes_and_metrics_are_open(path: str) -> None:
    async with world() as here, coordinator(here) as (url, _), here.session.get(url + path) as response:
        assert response.status == 200


async def test_a_heartbeat_makes_a_member_and_is_answered() -> None:
    async with world(version=3) as here, coordinator(here) as (url, _):
        beat = Heartbeat(role="rollout", name="rollout-7", instance="a", url="http://x", state="starting")
        async with here.session.post(
            f"{url}/v1/members", data=codec.encode(beat), headers=authorization(TOKEN)
        ) as response:
            answer = codec.decode(await response.read(), HeartbeatReply)
        assert (answer.policy_version, answer.stop) == (3, False)
        assert "rollout-7" in [member.name for member in here.members.all()]


async def test_a_body_that_is_no_heartbeat_is_refused() -> None:
    async with (
        world() as here,
        coordinator(here) as (url, _),
        here.session.post(f"{url}/v1/members", data=b"\xc1", headers=authorization(TOKEN)) as response,
    ):
        assert response.status == 400
        assert "the body is not a heartbeat" in (await response.json())["message"]


async def test_a_stop_request_is_passed_on() -> None:
    async with world() as here, coordinator(here) as (url, stops):
        async with here.session.post(f"{url}/v1/stop", headers=authorization(TOKEN)) as response:
            assert response.status == 200
        assert stops == ["asked over HTTP"]


async def test_the_status_is_complete_before_the_first_step() -> None:
    async with (
        world(Engine("rollout-0"), version=0) as here,
        coordinator(here) as (url, _),
        here.session.get(f"{url}/status", headers=authorization(TOKEN)) as response,
    ):
        status = await response.json()
    assert (status["name"], status["state"], status["step"], status["policy_version"]) == ("job", "Starting", 0, 0)
    assert {key for key, value in status.items() if value is None} == {
        "reward", "accuracy", "train_accuracy", "response_length", "kl", "tokens_per_second", "checkpoint", "eta_seconds",
    }  # fmt: skip
    members = {member["name"]: member for member in status["members"]}
    assert members["rollout-0"]["in_service"]
    assert members["rollout-0"]["weight_version"] == 0
    assert members["trainer-0"]["weight_version"] is None


async def test_the_metrics_are_what_prometheus_reads() -> None:
    async with (
        world(Engine("rollout-0"), version=4) as here,
        coordinator(here) as (url, _),
        here.session.get(f"{url}/metrics") as response,
    ):
        text = await response.text()
    lines = text.splitlines()
    assert "grpo_coordinator_policy_version 4.0" in lines
    assert "grpo_coordinator_rollouts_in_service 1.0" in lines


async def test_a_port_in_use_names_the_field() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with world() as here:
            app = make_app(TOKEN, here.members, Progress("j", SPEC, "i", here.members, here.weights), None, None)  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=rf"network\.coordinatorPort: cannot listen on 127\.0\.0\.1:{port}"):
                await serve(app, "127.0.0.1", port)


async def test_without_a_token_nothing_is_guarded() -> None:
    async with world() as here, coordinator(here, token="") as (url, _), here.session.get(f"{url}/status") as response:
        assert response.status == 200
