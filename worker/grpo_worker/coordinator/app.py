"""The coordinator's HTTP side: heartbeats in; status, metrics and the stop request.

Invariant: handlers only read state or set a flag; nothing that trains runs in a handler.
"""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from grpo_worker.coordinator.members import Members
from grpo_worker.coordinator.progress import Progress
from grpo_worker.errors import ConfigError
from grpo_worker.protocol.http import answer, door, read
from grpo_worker.protocol.messages import Heartbeat, HeartbeatReply


def make_app(
    token: str,
    members: Members,
    progress: Progress,
    reply: Callable[[Heartbeat], HeartbeatReply],
    stop: Callable[[str], None],
) -> web.Application:
    """Routes: POST /v1/members, POST /v1/stop, GET /status, /metrics, /healthz."""

    async def heartbeat(request: web.Request) -> web.Response:
        beat: Heartbeat = await read(request, Heartbeat, "a heartbeat")
        members.beat(beat)
        return answer(reply(beat))

    async def status(request: web.Request) -> web.Response:
        return web.json_response(progress.status())

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(progress.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def stop_run(request: web.Request) -> web.Response:
        stop("asked over HTTP")
        return web.json_response({"stopping": True})

    app = web.Application(middlewares=[door(token)], client_max_size=1 << 20)
    app.add_routes(
        [
            web.post("/v1/members", heartbeat),
            web.post("/v1/stop", stop_run),
            web.get("/status", status),
            web.get("/metrics", metrics),
            web.get("/healthz", healthz),
        ]
    )
    return app


async def serve(app: web.Application, host: str, port: int) -> web.AppRunner:
    """Listen. Raises ConfigError naming the port."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(
            f"network.coordinatorPort: cannot listen on {host}:{port}: {error.strerror or error}. Choose another port, or 0 for any free one."
        ) from error
    return runner
