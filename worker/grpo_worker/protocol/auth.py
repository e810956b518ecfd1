"""The per-job token that guards every port of a job.

Invariant: a request without the job's token is answered 401 before its body is read. Probes and metrics are open (the kubelet and Prometheus ask them).
"""

import hmac
import os

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from grpo_worker.environment import JOB_TOKEN

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})


def job_token() -> str:
    """The token of this process's job ('' when it was started by hand without one: then no port is guarded)."""
    return os.environ.get(JOB_TOKEN, "")


def authorization(token: str) -> dict[str, str]:
    """Request headers that carry the token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def allowed(header: str, token: str) -> bool:
    return not token or hmac.compare_digest(header.encode(), f"Bearer {token}".encode())


def middleware(token: str) -> Middleware:
    """aiohttp middleware that enforces the invariant."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS and not allowed(request.headers.get("Authorization", ""), token):
            return web.json_response(
                {"reason": "Unauthorized", "message": "the job's token is missing or wrong"}, status=401
            )
        return await handler(request)

    return check
