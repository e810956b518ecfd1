"""Stand-ins that speak the real protocol over loopback: rollout servers and a trainer, and the coordinator's side of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from grpo_worker.coordinator.dispatch import Dispatcher, DispatchOptions
from grpo_worker.coordinator.groups import Group, Sample
from grpo_worker.coordinator.member_client import MemberClient
from grpo_worker.coordinator.members import Members
from grpo_worker.coordinator.trainer_client import TrainerClient
from grpo_worker.coordinator.weight_sync import WeightSync
from grpo_worker.data.dataset import Prompt
from grpo_worker.protocol import codec
from grpo_worker.protocol.http import door, error_answer
from grpo_worker.protocol.messages import (
    ApplyWeightsReply,
    ApplyWeightsRequest,
    Array,
    Done,
    ErrorReply,
    GenerateEnd,
    GenerateRequest,
    GroupPlace,
    GroupResult,
    Heartbeat,
    PromptRequest,
    PublishReply,
    PublishRequest,
    SampleResult,
    Sampling,
    SleepReply,
    SleepRequest,
    StopRequest,
    StoreSource,
    TrainerRequest,
    VersionSpan,
)
from grpo_worker.rewards.base import RewardResult

TOKEN = "the-job-token"
TRAINER_GPU = "GPU of the trainer"
SAMPLING = Sampling(n=2, max_tokens=8, temperature=1.0, top_p=1.0, top_k=-1)


def prompt(position: int, epoch: int = 0, text: str = "") -> Prompt:
    return Prompt(
        uid=f"{epoch}-{position}",
        epoch=epoch,
        position=position,
        token_ids=[position + 10, 7],
        text=text or f"prompt {position}",
        ground_truth=str(position),
        data={},
        file=0,
        row=position,
    )


def groups(number: int) -> list[Group]:
    return [Group(order=order, prompt=prompt(order)) for order in range(number)]


def sample(tokens: list[int], score: float | None = 0.0, *, log_probs: list[float] | None = None, version: int = 0,
           accuracy: float | None = None, extra: dict[str, float] | None = None, finish: str = "stop") -> Sample:  # fmt: skip
    return Sample(
        token_ids=np.array(tokens, dtype=np.int32),
        log_probs=np.array(log_probs or [-1.0] * len(tokens), dtype=np.float32),
        finish_reason=finish,
        versions=[VersionSpan(version, 0, len(tokens))],
        reward=None if score is None else RewardResult(score, accuracy, extra or {}),
    )


def answer(request: PromptRequest, n: int, version: int) -> GroupResult:
    """What an engine makes of a prompt: n samples of three tokens that carry the prompt's first token."""
    first = int(request.token_ids.numpy()[0])
    samples = [
        SampleResult(
            token_ids=Array.of([first, index, 1], "int32"),
            log_probs=Array.of([-0.5, -0.25, -0.125], "float32"),
            finish_reason="stop",
            versions=[VersionSpan(version, 0, 3)],
        )
        for index in range(n)
    ]
    return GroupResult(id=request.id, samples=samples)


Behaviour = Callable[["Engine", web.StreamResponse, web.Request, GenerateRequest], Awaitable[None]]


async def good(engine: "Engine", stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:
    """Answers every prompt in turn."""
    for one in request.prompts:
        await engine.write(stream, answer(one, request.sampling.n, engine.version))
    await engine.end(stream, request)


class Engine:
    """A rollout server without a model. `behaviour` answers a generate request; `apply` a weight sync."""

    def __init__(self, name: str, behaviour: Behaviour = good, host: str = "127.0.0.1") -> None:
        self.name = name
        self.host = host
        self.behaviour = behaviour
        self.instance = "first"
        self.version = -1
        self.digest: str | None = None  # told in place of the right one
        self.refusal: ErrorReply | None = None
        self.answered: list[str] = []  # prompt ids, in the order in which answers were written
        self.asked: list[str] = []
        self.requests: list[GenerateRequest] = []
        self.syncs: list[int] = []
        self.places: list[GroupPlace] = []  # in groups, of those syncs that came over one
        self.devices: tuple[str, ...] = ("cpu",)
        self.hang_at_sync = False
        self.log: list[str] = []  # what was asked of it, in order
        self.state: Any = "ready"
        self.terminating = ""
        self.released = asyncio.Event()  # lets what hangs end when the test is over
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(middlewares=[door(TOKEN)], client_max_size=1 << 24)
        app.add_routes(
            [
                web.post("/v1/generate", self._generate),
                web.post("/v1/weights", self._weights),
                web.post("/v1/sleep", self._sleep),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, 0)
        await site.start()
        self.url = f"http://{self.host}:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]

    async def stop(self) -> None:
        self.released.set()
        if self._runner is not None:
            await self._runner.cleanup()

    def restart(self) -> None:
        """A new process under the same name: it has no weights."""
        self.instance, self.version = f"{self.instance}+", -1

    def beat(self) -> Heartbeat:
        return Heartbeat(
            role="rollout",
            name=self.name,
            instance=self.instance,
            url=self.url,
            state=self.state,
            terminating=self.terminating,
        )

    async def write(self, stream: web.StreamResponse, result: GroupResult) -> None:
        self.answered.append(result.id)
        await stream.write(codec.frame(result))

    async def end(self, stream: web.StreamResponse, request: GenerateRequest) -> None:
        tokens = 3 * request.sampling.n * len(request.prompts)
        await stream.write(
            codec.frame(GenerateEnd(request_id=request.request_id, seconds=0.1, generated_tokens=tokens))
        )

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        request = codec.decode(await http.read(), GenerateRequest)
        self.requests.append(request)
        self.asked += [one.id for one in request.prompts]
        self.log.append("generate")
        if request.min_weight_version is not None and self.version < request.min_weight_version:
            return error_answer(
                409, ErrorReply(reason="StaleWeights", message=f"weights are of version {self.version}")
            )
        stream = web.StreamResponse()
        await stream.prepare(http)
        await self.behaviour(self, stream, http, request)
        return stream

    async def _sleep(self, http: web.Request) -> web.Response:
        codec.decode(await http.read(), SleepRequest)
        self.log.append("sleep")
        if self.refusal is not None:
            return error_answer(503, self.refusal)
        self.version = -1
        return web.Response(body=codec.encode(SleepReply(device_bytes=(int(self.name[-1]) + 1) << 30)))

    async def pull(self, request: ApplyWeightsRequest) -> str:
        """The digest of what its workers have then."""
        if request.group is not None:
            self.places.append(request.group)
            return self.digest or sent(request.version)
        return self.digest or request.store.digest

    async def _weights(self, http: web.Request) -> web.Response:
        request = codec.decode(await http.read(), ApplyWeightsRequest)
        self.syncs.append(request.version)
        if self.hang_at_sync:
            await self.released.wait()
        self.log.append(f"weights {request.version}")
        if self.refusal is not None:
            return error_answer(503, self.refusal)
        digest = await self.pull(request)
        self.version = request.version
        reply = ApplyWeightsReply(
            version=request.version,
            digest=digest,
            bytes=1000,
            pull_seconds=0.5,
            apply_seconds=0.25,
            pause_seconds=0.3,
            total_seconds=0.8,
            devices=self.devices,
        )
        return web.Response(body=codec.encode(reply))


class Trainer:
    """Rank 0 without a model: answers what `answers` says by the type of the request."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.instance = "first"
        self.terminating = ""  # the rank's process that got SIGTERM
        self.calls: list[Any] = []
        self.answers: dict[type, Callable[[Any], Any]] = {
            PublishRequest: published,
            StopRequest: lambda request: Done(),
        }
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(middlewares=[door(TOKEN)], client_max_size=1 << 24)
        app.add_routes([web.post("/v1/trainer", self._call)])
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, 0)
        await site.start()
        self.url = f"http://{self.host}:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def beat(self) -> Heartbeat:
        return Heartbeat(
            role="trainer",
            name="trainer-0",
            instance=self.instance,
            url=self.url,
            state="ready",
            terminating=self.terminating,
        )

    async def _call(self, http: web.Request) -> web.StreamResponse:
        request: Any = codec.decode(await http.read(), TrainerRequest)
        self.calls.append(request)
        reply = self.answers[type(request)](request)
        if asyncio.iscoroutine(reply):
            reply = await reply
        if reply is None:  # the process is gone
            assert http.transport is not None
            http.transport.abort()
            return web.Response()
        if isinstance(reply, ErrorReply):
            return error_answer(500, reply)
        return web.Response(body=reply if isinstance(reply, bytes) else codec.encode(reply))


def published(request: PublishRequest) -> PublishReply:
    version = request.version
    source = StoreSource(host="127.0.0.1", port=1, version=version, digest=f"digest of {version}", total_bytes=1000)
    digest = sent(version) if request.group else ""
    return PublishReply(
        store=source if request.store else None, digest=digest, meeting_port=5000, device=TRAINER_GPU, seconds=0.125
    )


def sent(version: int) -> str:
    """The digest of a version that went over a group."""
    return f"sum of {version}"


@dataclass
class World:
    """The coordinator's side, with its members."""

    session: aiohttp.ClientSession
    members: Members
    client: MemberClient
    trainer: Trainer
    trainer_client: TrainerClient
    weights: WeightSync
    clock: "Clock"
    engines: list[Engine] = field(default_factory=list)
    events: list[tuple[str, str, str]] = field(default_factory=list)

    def emit(self, level: str, reason: str, message: str) -> None:
        self.events.append((level, reason, message))

    def reasons(self) -> list[str]:
        return [reason for _, reason, _ in self.events]

    async def join(self, *engines: Engine) -> None:
        """Start engines and let them register."""
        for engine in engines:
            await engine.start()
            self.engines.append(engine)
        self.beat()

    def beat(self) -> None:
        """One heartbeat of everybody."""
        for engine in self.engines:
            self.members.beat(engine.beat())
        self.members.beat(self.trainer.beat())

    def options(self, **changes: Any) -> DispatchOptions:
        values: dict[str, Any] = {
            "sampling": SAMPLING,
            "purpose": "train",
            "seed": 1,
            "deadline_seconds": 5.0,
            "max_attempts": 3,
            "max_num_seqs": 8,
            "no_engine_timeout_seconds": 5.0,
        }
        return DispatchOptions(**(values | changes))

    def dispatcher(self, on_done: Callable[[Group], None], **changes: Any) -> Dispatcher:
        return self.dispatcher_of(self.options(**changes), on_done)

    def dispatcher_of(self, options: DispatchOptions, on_done: Callable[[Group], None]) -> Dispatcher:
        return Dispatcher(self.client, self.members, self.weights, self.emit, options, on_done)


class Clock:
    """Monotonic seconds that a test may push forward."""

    def __init__(self) -> None:
        self.pushed = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.pushed


@asynccontextmanager
async def world(
    *engines: Engine,
    version: int | None = 0,
    timeout_seconds: float = 5.0,
    **settings: Any,
) -> AsyncIterator[World]:
    """A trainer and these engines, registered; weights of `version` published and applied."""
    clock = Clock()
    async with aiohttp.ClientSession() as session:
        events: list[tuple[str, str, str]] = []
        members = Members(30.0, clock, lambda *event: events.append(event))
        trainer = Trainer()
        await trainer.start()
        client = MemberClient(session, members, TOKEN)
        caller = TrainerClient(client, members, timeout_seconds)
        weights = WeightSync(
            client,
            members,
            caller,
            timeout_seconds,
            lambda *event: events.append(event),
            **settings,
        )
        here = World(session, members, client, trainer, caller, weights, clock, [], events)
        try:
            await here.join(*engines)
            await caller.connect(1.0)
            if version is not None:
                await weights.publish(version)
                await weights.settled()
            yield here
        finally:
            for engine in here.engines:
                await engine.stop()
            await trainer.stop()


async def heartbeats(here: World) -> None:
    """Everybody's heartbeat, often; to be cancelled."""
    while True:
        here.beat()
        await asyncio.sleep(0.02)
