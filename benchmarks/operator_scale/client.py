"""A small asynchronous client of the API server, for the benchmark's own part: people's requests, and what they would see.

Invariant: every time is taken by the monotonic clock of this process, when the answer or the event has arrived here.
"""

import asyncio
import base64
import json
import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

Document = dict[str, Any]

REQUEST_SECONDS = 60.0
MERGE = {"Content-Type": "application/merge-patch+json"}


class Client:
    """Acts as the user of a kubeconfig with a client certificate."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.server: str = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._ssl = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile() as pair:
            for part in ("client-certificate-data", "client-key-data"):
                pair.write(base64.b64decode(user[part]))
            pair.flush()
            self._ssl.load_cert_chain(pair.name)

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self._ssl, limit=0)
        self._session = aiohttp.ClientSession(self.server, connector=connector, read_bufsize=1 << 20)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def request(self, method: str, path: str, body: Document | None = None, **headers: str) -> Document:
        """Raises RuntimeError with the server's words."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} | headers
        async with self._session.request(method, path, data=data, headers=headers, timeout=timeout) as answer:
            document: Document = json.loads(await answer.read())
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status} {document.get('message')}")
            return document

    async def create(self, collection: str, document: Document) -> Document:
        return await self.request("POST", collection, document)

    async def patch_status(self, path: str, status: Document) -> Document:
        return await self.request("PATCH", f"{path}/status", {"status": status}, **MERGE)

    async def delete_at_once(self, path: str) -> Document:
        """Without a grace period: no kubelet has to end it."""
        return await self.request("DELETE", f"{path}?gracePeriodSeconds=0")

    async def follow(self, collection: str, take: Callable[[str, Document], None]) -> None:
        """Give every object, then every event, to `take`, for ever. Raises RuntimeError when events were lost."""
        listed = await self.request("GET", collection)
        for item in listed["items"]:
            take("ADDED", item)
        version = listed["metadata"]["resourceVersion"]
        while True:
            version = await self._watch(collection, version, take)

    async def _watch(self, collection: str, version: str, take: Callable[[str, Document], None]) -> str:
        """Until the server ends the watch, as it does with a reader that falls behind; the version to go on from."""
        query = {"watch": "1", "resourceVersion": version, "timeoutSeconds": "7200"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_SECONDS)
        async with self._session.get(collection, params=query, timeout=timeout) as answer:
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise RuntimeError(f"the watch of {collection} failed: {event['object']}")
                    version = event["object"]["metadata"]["resourceVersion"]
                    take(event["type"], event["object"])
        return version


class View:
    """What a person with two watches sees: the pods, and what each job's status says of them."""

    def __init__(self, count: Callable[[Document], int]) -> None:
        self._count = count
        self.pods: dict[str, str] = {}  # name -> uid
        self.running: set[str] = set()  # names
        self.shown: dict[str, int] = {}  # job -> pods at work by its status
        self.last_change = time.monotonic()
        self.pod_events = 0
        self._news = asyncio.Event()

    def take_pod(self, kind: str, pod: Document) -> None:
        name = pod["metadata"]["name"]
        self.pod_events += 1
        if kind == "DELETED":
            if self.pods.get(name) == pod["metadata"]["uid"]:
                del self.pods[name]
                self.running.discard(name)
        else:
            self.pods[name] = pod["metadata"]["uid"]
            (self.running.add if pod["status"].get("phase") == "Running" else self.running.discard)(name)
        self._tell()

    def take_job(self, kind: str, job: Document) -> None:
        self.shown[job["metadata"]["name"]] = self._count(job.get("status") or {})
        self._tell()

    def _tell(self) -> None:
        self.last_change = time.monotonic()
        self._news.set()

    async def until(self, holds: Callable[[], bool], what: str, limit_seconds: float) -> float:
        """The time at which it held first. Raises RuntimeError."""
        deadline = time.monotonic() + limit_seconds
        while not holds():
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise RuntimeError(
                    f"{what}: not after {limit_seconds:.0f} s ({len(self.pods)} pods, {len(self.running)} running, "
                    f"{sum(self.shown.values())} shown in status)"
                ) from None
        return time.monotonic()
