"""The door of the trainer: HTTP on rank 0, in a thread of its own, in front of one queue of operations.

Invariant: operations run one at a time in the order of their arrival, on the thread that owns the device; the state
of a save and the probes are answered while an operation runs. Every accepted operation is answered, with its reply or
an error.
"""

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

from aiohttp import web

from grpo_worker.errors import ConfigError
from grpo_worker.protocol.heartbeat import HeartbeatClient
from grpo_worker.protocol.http import answer, door, error_answer, read, refused
from grpo_worker.protocol.messages import (
    ErrorReply,
    Heartbeat,
    HeartbeatReply,
    SaveStatusReply,
    SaveStatusRequest,
    TrainerReply,
    TrainerRequest,
)
from grpo_worker.trainer.metrics import TrainerMetrics
from grpo_worker.trainer.options import TrainerOptions

MAX_REQUEST_BYTES = 1 << 32
QUEUED_OPERATIONS = 8
START_TIMEOUT_SECONDS = 30.0
MAX_STATUS_WAIT_SECONDS = 600.0

log = logging.getLogger(__name__)


class Operation:
    """A request that waits for its reply."""

    def __init__(self, request: TrainerRequest, body: bytes) -> None:
        self.request = request
        self.body = body
        self.reply: Future[TrainerReply | ErrorReply] = Future()

    def answer(self, reply: TrainerReply | ErrorReply) -> None:
        if not self.reply.done():
            self.reply.set_result(reply)


class TrainerServer:
    """Start it with `start`, take operations with `next`. All other threads' calls go through the event loop."""

    def __init__(
        self,
        options: TrainerOptions,
        token: str,
        save_status: Callable[[float], SaveStatusReply],
        terminated: threading.Event | None = None,
    ) -> None:
        """`terminated` is set when this process gets SIGTERM."""
        self.terminating = ""  # another rank's process that got SIGTERM
        self._terminated = terminated or threading.Event()
        self.metrics = TrainerMetrics()
        self.port = options.spec.network.trainer_port
        self.state: Literal["starting", "ready", "failed"] = "starting"
        self.message = ""
        self._options = options
        self._token = token
        self._save_status = save_status
        self._instance = uuid.uuid4().hex
        self._operations: queue.Queue[Operation] = queue.Queue(QUEUED_OPERATIONS)
        self._current: Operation | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._heartbeats: HeartbeatClient | None = None
        self._started: Future[int] = Future()
        self._unsent = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="trainer-server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://{self._options.advertised_host}:{self.port}"

    def start(self) -> None:
        """Listen. Raises ConfigError when the port is taken."""
        self._thread.start()
        self.port = self._started.result(START_TIMEOUT_SECONDS)

    def ready(self) -> None:
        """From now on the coordinator may send operations."""
        self.state = "ready"
        if self._loop is not None and self._heartbeats is not None:
            self._loop.call_soon_threadsafe(self._heartbeats.wake)

    def next(self, timeout_seconds: float) -> Operation | None:
        """The next operation, or None after the limit."""
        try:
            self._current = self._operations.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        return self._current

    def fail_current(self, reply: ErrorReply) -> None:
        """Answer what is being worked on (from any thread): the process is about to end."""
        if self._current is not None:
            self._current.answer(reply)

    @property
    def silent_seconds(self) -> float:
        """Time since the coordinator's last answer; 0 when there is no coordinator to tell."""
        return self._heartbeats.silent_seconds if self._heartbeats else 0.0

    @property
    def told_to_stop(self) -> bool:
        return bool(self._heartbeats and self._heartbeats.reply and self._heartbeats.reply.stop)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Send what is still to be sent, then stop listening."""
        if self._loop is None or self._stopping is None or not self._thread.is_alive():
            return
        deadline = time.monotonic() + timeout_seconds
        while self._unsent and time.monotonic() < deadline:
            time.sleep(0.01)
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(timeout_seconds)

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[door(self._token)])
        app.router.add_post("/v1/trainer", self._operate)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._options.host, self.port)
            try:
                await site.start()
            except OSError as error:
                where = f"{self._options.host}:{self.port}"
                message = f"network.trainerPort: {where} cannot be used: {error.strerror}. Free it, or choose another."
                self._started.set_exception(ConfigError(message))
                return
            self.port = runner.addresses[0][1]
            beating = self._start_heartbeats()
            self._started.set_result(self.port)
            await self._stopping.wait()
            if beating is not None:
                beating.cancel()
        finally:
            await runner.cleanup()

    def _start_heartbeats(self) -> asyncio.Task[None] | None:
        url, seconds = self._options.coordinator_url, self._options.spec.network.heartbeat_seconds
        if not url:
            return None
        self._heartbeats = HeartbeatClient(url, self._token, seconds, self._beat, self._heard)
        return asyncio.create_task(self._heartbeats.run())

    def _beat(self) -> Heartbeat:
        return Heartbeat(
            role="trainer",
            name=self._options.name,
            instance=self._instance,
            url=self.url,
            state=self.state,
            message=self.message,
            terminating=self._options.name if self._terminated.is_set() else self.terminating,
        )

    def _heard(self, reply: HeartbeatReply) -> None:
        if reply.stop:
            log.info("the coordinator says that the job is over")

    async def _operate(self, http: web.Request) -> web.Response:
        body = await http.read()
        request: TrainerRequest = await read(http, TrainerRequest, "an operation of the trainer")
        if isinstance(request, SaveStatusRequest):
            wait = min(request.wait_seconds, MAX_STATUS_WAIT_SECONDS)
            return answer(await asyncio.to_thread(self._save_status, wait))
        if self.state != "ready":
            raise refused(503, "NotReady", f"the trainer is {self.state}: {self.message or 'loading the model'}")
        operation = Operation(request, body)
        try:
            self._operations.put_nowait(operation)
        except queue.Full:
            raise refused(503, "Busy", f"{QUEUED_OPERATIONS} operations are waiting already") from None
        self._unsent += 1
        limit = self._options.spec.network.request_timeout_seconds
        try:
            future = asyncio.wrap_future(operation.reply)
            return await self._send(http, await asyncio.wait_for(future, limit))
        except TimeoutError:
            raise refused(504, "Timeout", f"not done within {limit:.0f} s") from None
        finally:
            self._unsent -= 1

    async def _send(self, http: web.Request, reply: TrainerReply | ErrorReply) -> web.Response:
        """Write the whole reply here: the process may end as soon as it is on its way."""
        if isinstance(reply, ErrorReply):
            response = error_answer(409 if reply.recoverable else 500, reply)
        else:
            response = answer(reply)
        await response.prepare(http)
        await response.write_eof()
        return response

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(text=f"{self.state}\n", status=200 if self.state == "ready" else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )
