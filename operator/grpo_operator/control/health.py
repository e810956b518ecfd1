"""What the kubelet and Prometheus ask the operator.

Invariant: `/healthz` fails only for what a restart cures: dead watches, a queue that does not move, a reconcile that hangs. A slow API server,
or not being the leader, is no reason to be restarted. `/readyz` says whether the operator would act: its picture is complete and somebody leads.
"""

from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

WATCH_LIMIT_SECONDS = 120.0
QUEUE_LIMIT_SECONDS = 300.0
RECONCILE_LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Vitals:
    """Of this moment."""

    watching: bool
    watch_overdue_seconds: float
    queue_oldest_seconds: float
    reconcile_longest_seconds: float
    synced: bool
    leader: str  # "" when nobody is known to lead


def ailments(vitals: Vitals) -> list[str]:
    """Why the process should be restarted; empty when it should not."""
    found = []
    if not vitals.watching:
        found.append("the watches have ended")
    if vitals.watch_overdue_seconds > WATCH_LIMIT_SECONDS:
        found.append(f"the watches are dead: a change is missing for {vitals.watch_overdue_seconds:.0f} s")
    if vitals.queue_oldest_seconds > QUEUE_LIMIT_SECONDS:
        found.append(f"a job waits for {vitals.queue_oldest_seconds:.0f} s for a worker")
    if vitals.reconcile_longest_seconds > RECONCILE_LIMIT_SECONDS:
        found.append(f"a reconcile hangs for {vitals.reconcile_longest_seconds:.0f} s")
    return found


def unready(vitals: Vitals) -> list[str]:
    """Why the operator does not act yet."""
    found = ailments(vitals)
    if not vitals.synced:
        found.append("jobs and pods are not listed yet")
    if not vitals.leader:
        found.append("no leader is known")
    return found


def make_app(vitals: Callable[[], Vitals], registry: CollectorRegistry) -> web.Application:
    """Routes: GET /healthz, /readyz, /metrics."""

    async def healthz(request: web.Request) -> web.Response:
        return _answer(ailments(vitals()))

    async def readyz(request: web.Request) -> web.Response:
        return _answer(unready(vitals()))

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    return app


def _answer(reasons: list[str]) -> web.Response:
    return web.Response(text="\n".join(reasons) or "ok", status=503 if reasons else 200)
