"""Leadership by a coordination.k8s.io Lease, so that two operators never act at once.

Invariant: `held()` is true only while the last renewal was *sent* less than RENEW_DEADLINE_SECONDS ago by this process's monotonic clock,
and another operator takes over only when it has *seen* no renewal for DURATION_SECONDS by its own. The first is shorter, so clocks need not
agree and a frozen process finds itself without leadership when it wakes, before its next request.

Not kubernetes.aio.leaderelection: it judges by the wall clock, sets no limit on its own requests (a renewal that hangs keeps the leader
leading) and does not give the Lease back on exit.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from grpo_operator.api import LEASES, Api, ApiError

logger = logging.getLogger(__name__)

DURATION_SECONDS = 15
RENEW_DEADLINE_SECONDS = 10.0
RETRY_SECONDS = 2.0


class LeaseLost(Exception):
    """Another operator leads, or nobody could be asked in time."""


class Lease:
    """This process's hold, or lack of it, on the Lease."""

    def __init__(
        self, api: Api, namespace: str, name: str, identity: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api, self._namespace, self._name, self.identity, self._clock = api, namespace, name, identity, clock
        self._valid_until: float | None = None
        self._seen: tuple[str, str] = ("", "")  # holder, renewTime
        self._seen_at = 0.0
        self._expires_seconds = float(DURATION_SECONDS)
        self.leader = ""  # who leads as far as known

    def held(self) -> bool:
        return self._valid_until is not None and self._clock() < self._valid_until

    async def acquire(self, before_waiting: Callable[[], Awaitable[None]]) -> None:
        """Returns when this operator leads. `before_waiting` is done once, when it cannot lead at once."""
        said, prepared = "", False
        while not await self._try():
            if not prepared:
                prepared = True
                await before_waiting()
                continue
            if self.leader and self.leader != said:
                said = self.leader
                logger.info("%s leads; waiting for its Lease %s/%s.", said, self._namespace, self._name)
            await asyncio.sleep(RETRY_SECONDS)
        logger.info("%s leads (Lease %s/%s).", self.identity, self._namespace, self._name)

    async def keep(self) -> None:
        """Renews for ever. Raises LeaseLost."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            renewed = await self._try()
            if not renewed and not self.held():
                self._valid_until = None
                raise LeaseLost(
                    f"the Lease {self._namespace}/{self._name} could not be renewed within {RENEW_DEADLINE_SECONDS:g} s"
                    + (f"; {self.leader} leads now" if self.leader not in ("", self.identity) else "")
                )

    async def release(self) -> None:
        """Give it back, so that the next operator need not wait."""
        if self._valid_until is None:
            return
        self._valid_until = None
        try:
            async with asyncio.timeout(RENEW_DEADLINE_SECONDS / 2):
                lease = await self._api.get(LEASES, self._namespace, self._name)
                if lease["spec"].get("holderIdentity") == self.identity:
                    lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
                    await self._api.replace(lease)
        except (ApiError, TimeoutError) as error:
            logger.warning("The Lease could not be given back (%s); it runs out in %d s.", error, DURATION_SECONDS)

    async def _try(self) -> bool:
        """One attempt to take or renew. False when another holds it or the server does not answer in time."""
        sent = self._clock()
        try:
            async with asyncio.timeout(RENEW_DEADLINE_SECONDS / 2):
                taken = await self._take()
        except ApiError as error:
            if error.forbidden:
                raise
            if not error.conflict and not error.already_exists:  # those two: another one was quicker
                logger.warning("Lease: %s", error)
            return False
        except TimeoutError:
            logger.warning(
                "Lease %s/%s: no answer within %g s.", self._namespace, self._name, RENEW_DEADLINE_SECONDS / 2
            )
            return False
        if taken:
            self.leader = self.identity
            self._valid_until = sent + RENEW_DEADLINE_SECONDS
        elif self._valid_until is not None:
            self._valid_until = sent  # another holds it: whatever this one believed is over
        return taken

    async def _take(self) -> bool:
        try:
            lease = await self._api.get(LEASES, self._namespace, self._name)
        except ApiError as error:
            if not error.not_found:
                raise
            await self._api.create(self._document(transitions=0))
            return True
        spec: dict[str, Any] = lease.get("spec") or {}
        holder, renewed = spec.get("holderIdentity") or "", spec.get("renewTime") or ""
        if (holder, renewed) != self._seen:
            self._seen, self._seen_at = (holder, renewed), self._clock()
            self._expires_seconds = float(spec.get("leaseDurationSeconds") or DURATION_SECONDS)
        if holder and holder != self.identity:
            self.leader = holder
            if self._clock() < self._seen_at + self._expires_seconds:
                return False
        transitions = int(spec.get("leaseTransitions") or 0) + (holder != self.identity)
        document = self._document(transitions, acquired=spec.get("acquireTime") if holder == self.identity else None)
        document["metadata"]["resourceVersion"] = lease["metadata"]["resourceVersion"]
        await self._api.replace(document)
        return True

    def _document(self, transitions: int, acquired: str | None = None) -> dict[str, Any]:
        now = _now()
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": DURATION_SECONDS,
                "acquireTime": acquired or now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }


def _now() -> str:
    """Kubernetes' MicroTime."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
