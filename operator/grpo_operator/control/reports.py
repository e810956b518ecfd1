"""What the coordinators of running jobs say of themselves.

Invariant: reading never blocks a reconcile: a poller asks each running coordinator every few seconds, with a short limit, and wakes the job
only when the answer says something new. The last report of a coordinator outlives its pod until another pod's takes its place. What answers
is a job's own code: nothing that it says, and nowhere that it points to, harms the operator or another job.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp

from grpo_operator.facts import Job, Pod, Report
from grpo_operator.token import job_token

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
PARALLEL = 32
ANSWER_BYTES = 1 << 20
SILENT_POLLS = 3  # without an answer before the job is woken


class CoordinatorSilent(Exception):
    """The coordinator did not take a request."""


@dataclass(frozen=True)
class Target:
    """A coordinator to ask."""

    job: Job
    pod: Pod
    port: int


def url(pod: Pod, port: int, path: str) -> str:
    return f"http://[{pod.ip}]:{port}{path}" if ":" in pod.ip else f"http://{pod.ip}:{port}{path}"


def news(document: dict[str, Any]) -> tuple[Any, ...]:
    """What of a status is worth a reconcile when it changes. Raises CoordinatorSilent for one that no coordinator of ours writes."""
    checkpoint, members = document.get("checkpoint") or {}, document.get("members") or []
    if not isinstance(checkpoint, dict) or not isinstance(members, list):
        raise CoordinatorSilent("not a status")
    return (
        *(document.get(key) for key in ("state", "step", "policy_version", "incarnation")),
        checkpoint.get("step"),
        tuple(
            tuple(member.get(key) for key in ("name", "state", "in_service", "weight_version"))
            for member in members
            if isinstance(member, dict)
        ),
    )


class Reports:
    """Reads coordinators' `/status` and asks them to stop."""

    def __init__(
        self,
        token_key: bytes,
        targets: Callable[[], Iterable[Target]],
        wake: Callable[[Job], None],
        count: Callable[[str], None] = lambda result: None,
        port_of: Callable[[Job], int] = lambda job: 0,
    ) -> None:
        self._token_key, self._targets, self._wake, self._count = token_key, targets, wake, count
        self._port_of = port_of
        self._reports: dict[str, Report] = {}  # by job uid
        self._silent: dict[str, int] = {}  # polls without an answer, by pod uid
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Reports":
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
            connector=aiohttp.TCPConnector(limit=PARALLEL),
            trust_env=False,  # pods are reached directly, never through a proxy
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def newest(self, job_uid: str) -> Report | None:
        return self._reports.get(job_uid)

    def forget(self, job_uid: str) -> None:
        self._reports.pop(job_uid, None)

    async def poll_forever(self, every_seconds: float) -> None:
        while True:
            started = asyncio.get_running_loop().time()
            await self.poll()
            await asyncio.sleep(max(0.2, every_seconds - (asyncio.get_running_loop().time() - started)))

    async def poll(self) -> None:
        """Ask every running coordinator once."""
        targets = list(self._targets())
        there = {target.pod.uid for target in targets}
        self._silent = {uid: polls for uid, polls in self._silent.items() if uid in there}
        slots = asyncio.Semaphore(PARALLEL)

        async def one(target: Target) -> None:
            async with slots:
                try:
                    await self._ask(target)
                except Exception:  # whatever one job's code answered, the others are asked
                    logger.exception("%s/%s: the report could not be taken.", target.job.namespace, target.job.name)

        await asyncio.gather(*(one(target) for target in targets))

    async def _ask(self, target: Target) -> None:
        assert self._session is not None
        job, pod = target.job, target.pod
        try:
            async with self._session.get(
                url(pod, target.port, "/status"), headers=self._headers(job), allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise CoordinatorSilent(f"HTTP {response.status}")
                document = json.loads(await _body(response))
                if not isinstance(document, dict):
                    raise CoordinatorSilent("not a status")
                told = news(document)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError, CoordinatorSilent) as error:
            self._count("error")
            silent = self._silent[pod.uid] = self._silent.get(pod.uid, 0) + 1
            if silent == SILENT_POLLS:
                logger.info(
                    "%s/%s: the coordinator %s does not answer (%s).",
                    job.namespace,
                    job.name,
                    pod.name,
                    error or type(error).__name__,
                )
                self._wake(job)
            return
        self._count("success")
        was_silent = self._silent.pop(pod.uid, 0) >= SILENT_POLLS
        before = self._reports.get(job.uid)
        self._reports[job.uid] = Report(pod.uid, datetime.now(UTC), document)
        if was_silent or before is None or before.pod_uid != pod.uid or news(before.document) != told:
            self._wake(job)

    async def stop(self, job: Job, pod: Pod) -> None:
        """Ask the coordinator to save and stop. Raises CoordinatorSilent."""
        assert self._session is not None
        try:
            async with self._session.post(
                url(pod, self._port_of(job), "/v1/stop"), headers=self._headers(job), allow_redirects=False
            ) as response:
                if response.status >= 300:
                    raise CoordinatorSilent(f"{pod.name}: the request to stop was answered HTTP {response.status}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CoordinatorSilent(
                f"{pod.name}: the request to stop was not taken: {error or 'no answer in time'}"
            ) from error

    def _headers(self, job: Job) -> dict[str, str]:
        return {"Authorization": f"Bearer {job_token(self._token_key, job.uid)}"}


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """Raises CoordinatorSilent when it is longer than a status can be."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > ANSWER_BYTES:
            raise CoordinatorSilent("an answer of more than 1 MiB")
    return bytes(body)
