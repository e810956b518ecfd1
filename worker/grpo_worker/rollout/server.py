"""HTTP in front of the engine.

Invariant: every request gets an answer of the contract: frames that end with `GenerateEnd`, or a status of 400 and
above with an `ErrorReply`. When the client goes away, or its machine falls silent, its requests leave the engine; a weight
swap that has begun goes on.
"""

import asyncio
import logging
import math
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, TypeVar

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from grpo_worker import logs
from grpo_worker.errors import GRPOError, StalledError
from grpo_worker.protocol import codec
from grpo_worker.protocol.http import answer, door, read, refused
from grpo_worker.protocol.messages import ApplyWeightsRequest, GenerateEnd, GenerateRequest, SleepRequest
from grpo_worker.rollout import metrics
from grpo_worker.rollout.engine import EngineDeadError, RolloutEngine
from grpo_worker.rollout.generation import generate
from grpo_worker.weightsync.manifest import VersionNotHeldError, WeightsMismatchError

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 << 20
T = TypeVar("T")

STATUS_OF_ERROR: dict[type[GRPOError], int] = {
    EngineDeadError: 503, VersionNotHeldError: 409, WeightsMismatchError: 422, StalledError: 504,
}  # fmt: skip


class RolloutServer:
    """The routes of one replica."""

    def __init__(self, engine: RolloutEngine, *, token: str, unready_reason: Callable[[], str]) -> None:
        self._engine, self._token, self._unready_reason = engine, token, unready_reason
        self.started = False  # set once the engine has loaded

    def app(self) -> web.Application:
        entrance = door(self._token, STATUS_OF_ERROR, lambda reason: metrics.ERRORS.labels(reason).inc())
        app = web.Application(middlewares=[entrance], client_max_size=MAX_BODY_BYTES)
        app.add_routes([
            web.post("/v1/generate", self._generate), web.post("/v1/weights", self._weights), web.post("/v1/sleep", self._sleep),
            web.get("/healthz", self._healthz), web.get("/readyz", self._readyz), web.get("/metrics", self._metrics),
        ])  # fmt: skip
        return app

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        message: GenerateRequest = await self._read(request, GenerateRequest)
        if problem := invalid(message):
            raise refused(400, "InvalidRequest", problem)
        wanted, version = message.min_weight_version, self._engine.weight_version
        if self._engine.broken or (wanted is not None and (version is None or version < wanted)):
            raise refused(
                409, "StaleWeights",
                self._engine.broken or f"the engine serves weight version {version}, the request needs {wanted} or newer. Sync this replica first.",
            )  # fmt: skip
        response = web.StreamResponse(headers={"Content-Type": codec.CONTENT_TYPE})
        await response.prepare(request)
        async with aclosing(generate(self._engine, message)) as results:
            async for result in results:
                if isinstance(result, GenerateEnd):
                    metrics.GENERATED_TOKENS.inc(result.generated_tokens)
                elif result.error_kind:
                    metrics.ERRORS.labels(result.error_kind).inc()
                await response.write(codec.frame(result))
        metrics.REQUESTS.inc()
        await response.write_eof()
        return response

    async def _weights(self, request: web.Request) -> web.StreamResponse:
        message: ApplyWeightsRequest = await self._read(request, ApplyWeightsRequest)
        store = message.store
        if (store is None) == (message.group is None) or (store and message.version != store.version):
            raise refused(
                400,
                "InvalidRequest",
                f"version {message.version} must come either from a store that has it, or over a group (store: {store}, group: {message.group})",
            )
        if message.timeout_seconds <= 0:
            raise refused(400, "InvalidRequest", f"timeout_seconds is {message.timeout_seconds}, must be positive")
        task = asyncio.create_task(self._engine.apply_weights(message))
        try:
            reply = await asyncio.shield(task)
        except GRPOError as error:
            metrics.WEIGHT_SYNC_FAILURES.labels(error.reason).inc()
            log.error("weight sync to version %d failed: %s", message.version, error)
            raise
        finally:
            metrics.serving(self._engine.weight_version)
        logs.at(version=reply.version)
        metrics.WEIGHT_SYNC_BYTES.inc(reply.bytes)
        for part in ("pull", "apply", "pause", "total"):
            metrics.WEIGHT_SYNC_SECONDS.labels(part).observe(getattr(reply, f"{part}_seconds"))
        return answer(reply)

    async def _sleep(self, request: web.Request) -> web.StreamResponse:
        message: SleepRequest = await self._read(request, SleepRequest)
        if message.timeout_seconds <= 0:
            raise refused(400, "InvalidRequest", f"timeout_seconds is {message.timeout_seconds}, must be positive")
        return answer(await asyncio.shield(asyncio.create_task(self._engine.sleep(message))))

    async def _healthz(self, request: web.Request) -> web.Response:
        if not self.started:
            return web.Response(status=503, text="the engine is loading the model\n")
        dead = self._engine.dead
        return web.Response(status=503 if dead else 200, text="the engine is dead\n" if dead else "ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        reason = self._unready_reason()
        return web.Response(status=503 if reason else 200, text=f"{reason or 'ready'}\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _read(self, request: web.Request, kind: type[T]) -> T:
        message: T = await read(request, kind, f"a {kind.__name__}")
        if not self.started:
            raise refused(503, "Starting", "the engine is loading the model; try again when /readyz says so")
        if self._engine.dead:
            self._engine.check_health()
        return message


def invalid(request: GenerateRequest) -> str:
    """What is wrong with a request as a whole; '' when nothing is."""
    sampling = request.sampling
    rules: list[tuple[bool, str]] = [
        (bool(request.prompts), "prompts is empty"),
        (sampling.n >= 1, f"sampling.n is {sampling.n}, must be at least 1"),
        (sampling.max_tokens >= 1, f"sampling.max_tokens is {sampling.max_tokens}, must be at least 1"),
        (sampling.temperature >= 0, f"sampling.temperature is {sampling.temperature}, must not be negative"),
        (0 < sampling.top_p <= 1, f"sampling.top_p is {sampling.top_p}, must be in (0, 1]"),
        (
            sampling.top_k == -1 or sampling.top_k >= 1,
            f"sampling.top_k is {sampling.top_k}, must be -1 (all) or at least 1",
        ),
        (0 <= sampling.min_p <= 1, f"sampling.min_p is {sampling.min_p}, must be in [0, 1]"),
        (request.deadline_seconds > 0, f"deadline_seconds is {request.deadline_seconds}, must be positive"),
    ]
    for prompt in request.prompts:
        array = prompt.token_ids
        integers = array.dtype in ("int32", "int64") and len(array.data) % (int(array.dtype[3:]) // 8) == 0
        rules.append(
            (
                integers,
                f"prompt '{prompt.id}': token_ids must be whole int32 or int64 values, got {len(array.data)} bytes of {array.dtype}",
            )
        )
        rules.append((bool(array.data), f"prompt '{prompt.id}' has no tokens"))
    twice = [name for name, count in Counter(prompt.id for prompt in request.prompts).items() if count > 1]
    rules.append((not twice, f"prompt ids occur twice: {', '.join(twice[:5])}"))
    return next((message for holds, message in rules if not holds), "")


async def listen(
    app: web.Application, host: str, port: int, dead_after_seconds: float = 30.0
) -> tuple[web.AppRunner, int]:
    """Serve an app; returns its runner and the port. Raises OSError.

    Args:
        dead_after_seconds: a client whose machine has not answered for so long is gone, whether it has said so or not.
    """
    # A client that disconnects cancels its handler: that is how its requests leave the engine.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5.0)
    await runner.setup()
    try:
        await web.SockSite(runner, _listener(host, port, dead_after_seconds)).start()
    except OSError:
        await runner.cleanup()
        raise
    address: Any = runner.addresses[0]
    return runner, int(address[1])


def _listener(host: str, port: int, dead_after_seconds: float) -> socket.socket:
    """Its connections are probed while they are idle; Linux' own patience is two hours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=128)
    probe_seconds = max(1, math.ceil(dead_after_seconds / 3))
    options = {
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): probe_seconds,
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): probe_seconds,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): math.ceil(dead_after_seconds * 1000),
    }
    for (level, option), value in options.items():
        listener.setsockopt(level, option, value)
    return listener
