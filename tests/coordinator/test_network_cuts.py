"""A real cut between each pair of roles: who falls silent loses its requests, the run goes on without it or ends, and says so at once.

The coordinator is the real process. Trainer and engines are stand-ins that speak the protocol, each on a machine of its own, with the
real transport of the weights between them.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from coordinator_helpers import TOKEN, Engine, answer
from coordinator_stage import BATCH, Learner, Stage
from machines import Network, missing

from grpo_worker.config import resolved_document
from grpo_worker.environment import COORDINATOR_PORT, JOB_TOKEN, LISTEN_HOST, RUN_DIRECTORY, TERMINATION_LOG
from grpo_worker.protocol.auth import authorization
from grpo_worker.protocol.heartbeat import HeartbeatClient
from grpo_worker.protocol.messages import (
    ApplyWeightsRequest,
    GenerateRequest,
    PublishReply,
    PublishRequest,
    SaveRequest,
    UpdateRequest,
)
from grpo_worker.rollout.server import listen
from grpo_worker.weightsync.client import pull
from grpo_worker.weightsync.manifest import TensorSpec
from grpo_worker.weightsync.server import WeightServer
from grpo_worker.weightsync.snapshot import SnapshotStore

PORT = 7000
HEARTBEAT_SECONDS, MEMBER_TIMEOUT_SECONDS = 0.2, 4.0
SOON_SECONDS = MEMBER_TIMEOUT_SECONDS + 6.0  # a loaded machine's share included
LIMIT_SECONDS = 120.0
WEIGHTS = TensorSpec("weights", (1 << 20,), "float32")

pytestmark = pytest.mark.skipif(bool(reason := missing()), reason=reason)


async def steady(
    engine: "PullingEngine", stream: web.StreamResponse, http: web.Request, request: GenerateRequest
) -> None:
    """Takes its time; holds a request for ever when it is told to."""
    for one in request.prompts:
        await asyncio.sleep(0.1)
        if engine.held is not None:
            engine.held.set()
            await engine.released.wait()
        await engine.write(stream, answer(one, request.sampling.n, engine.version))
    await engine.end(stream, request)


class PullingEngine(Engine):
    """Gets its weights over the network."""

    held: threading.Event | None = None

    async def pull(self, request: ApplyWeightsRequest) -> str:
        deadline = time.monotonic() + request.timeout_seconds
        manifest = await asyncio.to_thread(
            lambda: pull(
                request.store,
                token=TOKEN,
                into=lambda size: memoryview(bytearray(size)),
                timeout_seconds=MEMBER_TIMEOUT_SECONDS,
                deadline=deadline,
            )
        )
        return manifest.digest


class ServingTrainer(Learner):
    """Serves what it publishes."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host
        self.asked: list[type] = []
        self.answers[PublishRequest] = self.publish

    async def start(self) -> None:
        await super().start()
        self.store = SnapshotStore(timeout_seconds=10.0)
        self.server = WeightServer(self.store, self.host, 0, TOKEN, timeout_seconds=MEMBER_TIMEOUT_SECONDS)

    def publish(self, request: PublishRequest) -> PublishReply:
        with self.store.begin(request.version, [WEIGHTS]) as writer:
            writer.write(WEIGHTS.name, torch.full(WEIGHTS.shape, float(request.version)))
            return PublishReply(store=self.server.source(writer.commit()), device="cpu", seconds=0.0)

    def hang_at(self, kind: type) -> None:
        """It never answers this one."""

        async def never(request: object) -> bytes:
            self.asked.append(type(request))
            await asyncio.get_running_loop().create_future()
            return b""

        self.answers[kind] = never


class Job:
    """A coordinator process and its members, each on its machine."""

    def __init__(self, stage: Stage, network: Network) -> None:
        self.network = network
        self.directory = stage.root / "run"
        self.url = f"http://{network['coordinator'].address}:{PORT}"
        job = stage.job(
            rollout={"n": 2, "maxStaleness": 1, "replicas": 2},
            trainer={"totalEpochs": 100, "testFreq": 0, "loggers": ["jsonl"]},
            checkpoint={"saveFreq": 3},
            network={"heartbeatSeconds": HEARTBEAT_SECONDS, "memberTimeoutSeconds": MEMBER_TIMEOUT_SECONDS},
        )
        (stage.root / "job.yaml").write_text(json.dumps(resolved_document(job)))
        self.trainer = ServingTrainer(network["trainer"].address)
        self.engines = [PullingEngine(name, steady, network[name].address) for name in ("rollout-0", "rollout-1")]
        for name, member in (("trainer", self.trainer), *((engine.name, engine) for engine in self.engines)):
            network[name].do(member.start())
            network[name].start(HeartbeatClient(self.url, TOKEN, HEARTBEAT_SECONDS, member.beat).run())
        environment = os.environ | {
            COORDINATOR_PORT: str(PORT),
            JOB_TOKEN: TOKEN,
            LISTEN_HOST: network["coordinator"].address,
            RUN_DIRECTORY: str(self.directory),
            TERMINATION_LOG: str(stage.root / "last-word"),
        }
        self._last_word = stage.root / "last-word"
        command = [sys.executable, "-m", "grpo_worker.entrypoint", "coordinator", "--job", str(stage.root / "job.yaml")]
        self._output = stage.root / "coordinator.out"
        with self._output.open("wb") as output:
            self.process = network["coordinator"].process(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def status(self) -> dict[str, Any]:
        return self.network["coordinator"].do(self._ask("GET", "/status"))

    def serving(self) -> set[str]:
        return {member["name"] for member in self.status()["members"] if member["in_service"]}

    def stop(self) -> int:
        self.network["coordinator"].do(self._ask("POST", "/v1/stop"))
        return self.process.wait(LIMIT_SECONDS)

    def steps(self) -> int:
        return max((line["step"] for line in self.lines("metrics.jsonl")), default=0)

    def lines(self, name: str) -> list[dict[str, Any]]:
        path: Path = self.directory / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def told(self, reason: str, *words: str, after: int = 0) -> bool:
        events = self.lines("events.jsonl")[after:]
        return any(e["reason"] == reason and all(word in e["message"] for word in words) for e in events)

    def until(self, condition: Callable[[], bool], limit_seconds: float = LIMIT_SECONDS) -> None:
        deadline = time.monotonic() + limit_seconds
        while not condition():
            assert self.process.poll() is None, self._output.read_text()[-3000:]
            assert time.monotonic() < deadline, self._output.read_text()[-3000:]
            time.sleep(0.05)

    def last_word(self) -> dict[str, Any]:
        return dict(json.loads(self._last_word.read_text()))

    async def _ask(self, method: str, path: str) -> Any:
        async with (
            aiohttp.ClientSession(headers=authorization(TOKEN)) as session,
            session.request(method, self.url + path) as response,
        ):
            return await response.json()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.network["trainer"].do(self.trainer.stop())
        self.trainer.server.close()
        for engine in self.engines:
            self.network[engine.name].do(engine.stop())


@pytest.fixture
def job(stage: Stage) -> Iterator[Job]:
    network = Network("coordinator", "trainer", "rollout-0", "rollout-1")
    try:
        job = Job(stage, network)
        try:
            yield job
        finally:
            job.end()
    finally:
        network.close()


def test_an_engine_that_is_cut_off_costs_the_run_its_limit_and_joins_again(job: Job) -> None:
    """In generation, in a sync, and from the trainer alone."""
    engine = job.engines[1]
    job.until(lambda: job.steps() >= 2)

    def cut_and_heal(one: str, *words: str, told: str, quiet: bool) -> None:
        before, steps = len(job.lines("events.jsonl")), job.steps()
        job.network.cut(one, "rollout-1")
        if quiet:  # the coordinator hears nothing of it either
            job.until(lambda: "rollout-1 has been silent for" in job.status()["message"], MEMBER_TIMEOUT_SECONDS)
        job.until(lambda: job.told(told, "rollout-1", *words, after=before), SOON_SECONDS)
        assert not quiet or job.told("MemberSilent", "rollout-1 has been silent", *words, after=before)
        lost_at = job.steps()
        job.until(lambda: job.steps() >= max(lost_at, steps) + 3)
        assert "rollout-1" not in job.serving(), "the steps were made without it"
        engine.hang_at_sync, engine.held = False, None
        job.network.heal(one, "rollout-1")
        before = len(job.lines("events.jsonl"))
        job.until(lambda: job.told("RolloutJoined", "rollout-1 serves", after=before), 30.0)
        asked, steps = len(engine.asked), job.steps()
        job.until(lambda: len(engine.asked) > asked and job.steps() > steps)

    engine.held = threading.Event()
    assert engine.held.wait(LIMIT_SECONDS)
    cut_and_heal("coordinator", "generation of", told="RolloutLost", quiet=True)
    engine.hang_at_sync, syncs = True, len(engine.syncs)
    job.until(lambda: len(engine.syncs) > syncs)
    cut_and_heal("coordinator", "the sync of version", told="WeightSyncFailed", quiet=True)
    cut_and_heal("trainer", "weight server", "lost after", told="WeightSyncFailed", quiet=False)
    assert job.stop() == 80, job.last_word()
    ledger = job.lines("ledger.jsonl")
    assert all(len(line["trained"]) == BATCH and not line["failed"] for line in ledger), "no prompt paid for it"
    trained = [uid for line in ledger for uid in line["trained"]]
    assert len(trained) == len(set(trained))


@pytest.mark.parametrize("kind", [UpdateRequest, SaveRequest], ids=["update", "save"])
def test_a_trainer_that_is_cut_off_ends_the_run_at_the_limit(job: Job, kind: type) -> None:
    job.until(lambda: job.steps() >= 1)
    job.trainer.hang_at(kind)
    job.until(lambda: kind in job.trainer.asked)
    job.network.cut("coordinator", "trainer")
    what = kind.__struct_config__.tag  # type: ignore[attr-defined]
    job.until(lambda: "trainer-0 has been silent for" in job.status()["message"], MEMBER_TIMEOUT_SECONDS)
    started = time.monotonic()
    assert job.process.wait(SOON_SECONDS + 30.0) == 75
    assert time.monotonic() - started < SOON_SECONDS + 15.0
    word = job.last_word()
    assert word["reason"] == "TrainerLost"
    assert "trainer-0 was silent for" in word["message"] and f"during {what}" in word["message"]
    assert job.told("MemberSilent", "trainer-0", f"what waits for it: {what}")


def test_an_engine_drops_the_requests_of_a_client_that_is_cut_off() -> None:
    """Nothing tells the server: it finds out, and the engine is free when the network is whole again."""
    network = Network("client", "server")
    begun, left = threading.Event(), threading.Event()

    async def generate(request: web.Request) -> web.Response:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            left.set()
        return web.Response()

    async def ask(url: str) -> None:
        async with aiohttp.ClientSession() as session, session.post(url):
            pass

    try:
        app = web.Application()
        app.router.add_post("/v1/generate", generate)
        machine = network["server"]
        runner, port = machine.do(listen(app, machine.address, 0, MEMBER_TIMEOUT_SECONDS))
        network["client"].start(ask(f"http://{machine.address}:{port}/v1/generate"))
        assert begun.wait(10)
        network.cut("client", "server")
        assert not left.wait(MEMBER_TIMEOUT_SECONDS / 2)
        assert left.wait(SOON_SECONDS)
        machine.do(runner.cleanup())
    finally:
        network.close()
