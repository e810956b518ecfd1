"""The operator's process: what runs beside what, and in which order it starts and ends.

Invariant: reconciles run only after a complete list made while leading, and only while the Lease is held. The process ends when it is told to,
when it loses the Lease, or when its watches end; in the last two cases with an error, so that the kubelet starts it anew.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from aiohttp import web

from grpo_operator import build
from grpo_operator.api import GRPOJOBS, PODS, Api, ApiError, Resource
from grpo_operator.control.execute import Executor
from grpo_operator.control.health import Vitals, make_app
from grpo_operator.control.kubernetes_events import EventRecorder
from grpo_operator.control.lease import Lease, LeaseLost
from grpo_operator.control.metrics import JobView, OperatorMetrics
from grpo_operator.control.read_job import read_job
from grpo_operator.control.read_pod import read_pod
from grpo_operator.control.reconciler import Reconciler
from grpo_operator.control.reports import Reports, Target
from grpo_operator.control.store import Document, Key, Store, version_of
from grpo_operator.control.watches import Watches
from grpo_operator.control.workqueue import WorkQueue, work
from grpo_operator.facts import Job
from grpo_operator.handlers import SELECTOR, WatchThread
from grpo_operator.labels import Role
from grpo_operator.planning.plan import plan
from grpo_operator.settings import Settings
from grpo_worker.catalogue import Number

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 20.0
OVERDUE_SECONDS = 30.0  # a change missing for so long: list, to learn whether the watch is dead or the object gone
CHECK_SECONDS = 5.0


class CannotStart(Exception):
    """The cluster is not prepared for the operator; the message says what to do."""


class Ended(Exception):
    """The process cannot go on and must be started anew."""


class Process:
    """All parts of a running operator."""

    def __init__(self, settings: Settings, token_key: bytes) -> None:
        self._settings = settings
        self._token_key = token_key
        self._namespaces = settings.namespaces or ("",)
        self._metrics = OperatorMetrics(self._views)
        self._watches = Watches()
        self._store = Store(read_job, read_pod)
        self._queue: WorkQueue[Key] = WorkQueue()
        self._synced = False
        self._leading = False
        self._lease: Lease | None = None
        self._watch_thread: WatchThread | None = None
        self._reports: Reports | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises CannotStart, LeaseLost, Ended, ApiError or NoCluster."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        async with (
            Api(self._metrics.count_request, self._may_write) as api,
            Reports(
                self._token_key,
                self._targets,
                self._wake,
                lambda result: self._metrics.polls.labels(result).inc(),
                build.coordinator_port,
            ) as reports,
        ):
            self._reports = reports
            self._lease = Lease(api, self._settings.lease_namespace, self._settings.lease_name, identity)
            self._metrics.ask(self._gauges)
            await self._check_cluster(api)
            server = await self._serve()
            watch_thread = self._watch_thread = WatchThread(self._settings.namespaces, self._deliver)
            watch_thread.start()
            try:
                await self._run_until_stopped(api, reports, self._lease, watch_thread, identity)
            finally:
                await self._lease.release()
                await watch_thread.stop()
                await server.cleanup()

    async def _run_until_stopped(
        self, api: Api, reports: Reports, lease: Lease, watch_thread: WatchThread, identity: str
    ) -> None:
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        watches_end = asyncio.ensure_future(watch_thread.ended)
        resync = asyncio.create_task(self._resync(api), name="resync")
        leading = asyncio.create_task(self._lead(api, reports, lease, identity), name="leading")
        try:
            parts: set[asyncio.Future[Any]] = {stopping, watches_end, resync, leading}
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            if watches_end.done() and not stopping.done():
                error = watches_end.result()
                raise Ended(f"the watches have ended: {error or 'kopf stopped'}") from error
            for part in (resync, leading):
                if part.done():
                    part.result()
            logger.info("Stopping: no new work; what runs may finish within %g s.", DRAIN_SECONDS)
        finally:
            for task in (stopping, resync, leading):
                task.cancel()
            await asyncio.gather(stopping, resync, leading, return_exceptions=True)

    async def _lead(self, api: Api, reports: Reports, lease: Lease, identity: str) -> None:
        """Wait for the Lease, then work while it is held. Cancelled to stop: running reconciles are finished first."""
        await lease.acquire(lambda: self._list(api))  # who waits for another one is ready to follow
        keeping = asyncio.create_task(lease.keep(), name="lease")
        try:
            await self._list(api)  # what changed while another one led
        except BaseException:
            keeping.cancel()  # else it would take the Lease again after `run` has given it back
            raise
        executor = Executor(
            api, self._store, self._watches, EventRecorder(api, identity), reports, self._settings, self._token_key
        )
        reconciler = Reconciler(self._store, reports, executor, plan, self._settings, self._metrics)
        self._leading = True
        for key in self._store.jobs():
            self._queue.add(key)
        workers = [
            asyncio.create_task(work(self._queue, reconciler.reconcile), name=f"worker-{number}")
            for number in range(self._settings.workers)
        ]
        others = [
            asyncio.create_task(reports.poll_forever(self._settings.poll_seconds), name="reports"),
            keeping,
        ]
        try:
            done, _ = await asyncio.wait({*workers, *others}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            raise Ended("a part of the operator has stopped")
        except LeaseLost:
            for task in workers:
                task.cancel()
            raise
        except asyncio.CancelledError:
            self._queue.close()
            await asyncio.wait(workers, timeout=DRAIN_SECONDS)
            raise
        finally:
            for task in (*workers, *others):
                task.cancel()
            await asyncio.gather(*workers, *others, return_exceptions=True)

    # ---- what the parts ask of each other

    def _may_write(self) -> bool:
        return self._lease is not None and self._lease.held()

    def _deliver(self, resource: Resource, document: dict[str, Any], kind: str | None) -> None:
        """An event of a watch, on the main loop."""
        metadata, version, gone = document["metadata"], version_of(document), kind == "DELETED"
        self._metrics.watch_events.labels(resource.plural).inc()
        self._watches.deliver(resource.plural, metadata["uid"], version, gone, listed=kind is None)
        key: Key | None
        if resource is GRPOJOBS and gone:
            key = Key(metadata["namespace"], metadata["name"])
            self._store.remove_job(key, metadata["uid"], version)
        elif resource is GRPOJOBS:
            key = self._store.update_job(document)
        elif gone:
            key = self._store.remove_pod(metadata["uid"], version)
        else:
            key = self._store.update_pod(document)
        self._add(key)

    def _wake(self, job: Job) -> None:
        self._queue.add(Key(job.namespace, job.name))

    def _targets(self) -> Iterator[Target]:
        """Coordinators to ask: those that run."""
        for key in self._store.jobs():
            job = self._store.job(key)
            if job is None or job.spec is None:
                continue
            for pod in self._store.pods(job):
                if pod.role is Role.COORDINATOR and pod.phase == "Running" and pod.ip and pod.ended is None:
                    with contextlib.suppress(build.CannotBuild):  # then the operator did not make this pod
                        yield Target(job, pod, build.coordinator_port(job))

    # ---- lists

    async def _list(self, api: Api) -> None:
        """Make the picture complete: take what the API server holds, drop what it does not."""
        jobs, jobs_version = await self._take(api, GRPOJOBS, "", self._store.update_job)
        pods, pods_version = await self._take(api, PODS, SELECTOR, self._store.update_pod)
        for key, uid in self._store.absent_jobs(jobs, jobs_version):
            self._store.remove_job(key, uid)
            self._add(key)
        for uid in self._store.absent_pods(pods, pods_version):
            self._add(self._store.remove_pod(uid))
        self._synced = True

    async def _take(
        self, api: Api, resource: Resource, selector: str, update: Callable[[Document], Key | None]
    ) -> tuple[set[str], int]:
        """The uids of a complete list, and a version that none of it was read before."""
        uids: set[str] = set()
        versions = []
        for namespace in self._namespaces:
            async for page in api.pages(resource, namespace, selector):
                versions.append(version_of(page))
                for document in page["items"]:
                    uid = document["metadata"]["uid"]
                    uids.add(uid)
                    self._watches.expect(resource.plural, uid, version_of(document))
                    self._add(update(document))
        self._watches.keep_only(resource.plural, uids)
        return uids, min(versions)

    def _add(self, key: Key | None) -> None:
        if key is not None and self._leading:
            self._queue.add(key)

    async def _resync(self, api: Api) -> None:
        """List now and then, and when a watch seems to have missed something."""
        loop = asyncio.get_running_loop()
        listed, wanted = loop.time(), False
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            age = loop.time() - listed
            wanted |= self._watches.take_gaps() or age > self._settings.resync_seconds
            if wanted or (age > OVERDUE_SECONDS and self._watches.overdue_seconds() > OVERDUE_SECONDS):
                try:
                    await self._list(api)
                except ApiError as error:
                    logger.warning("The cluster could not be listed: %s", error)
                else:
                    wanted = False
                listed = loop.time()

    # ---- start

    async def _check_cluster(self, api: Api) -> None:
        """Raises CannotStart when the operator could not work here."""
        for namespace in self._namespaces:
            for resource in (GRPOJOBS, PODS):
                try:
                    await api.can_list(resource, namespace)
                except ApiError as error:
                    raise CannotStart(_explain(error, api.server)) from error

    async def _serve(self) -> web.AppRunner:
        runner = web.AppRunner(make_app(self._vitals, self._metrics.registry), access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, None, self._settings.metrics_port).start()
        except OSError as error:
            await runner.cleanup()
            raise CannotStart(
                f"--metrics-port {self._settings.metrics_port}: cannot listen: {error.strerror or error}. Choose a free port."
            ) from error
        return runner

    def _vitals(self) -> Vitals:
        return Vitals(
            watching=self._watch_thread is None or self._watch_thread.alive(),
            watch_overdue_seconds=self._watches.overdue_seconds(),
            queue_oldest_seconds=self._queue.oldest_waiting_seconds() if self._leading else 0.0,
            reconcile_longest_seconds=self._queue.longest_working_seconds(),
            synced=self._synced,
            leader="" if self._lease is None else self._lease.leader,
        )

    def _views(self) -> Iterable[JobView]:
        if not self._may_write():  # one operator speaks of the jobs
            return
        for key in self._store.jobs():
            job = self._store.job(key)
            if job is not None:
                report = None if self._reports is None else self._reports.newest(job.uid)
                yield JobView(job, self._store.pods(job), report)

    def _gauges(self) -> Iterator[Number]:
        """Asked at each scrape."""
        jobs, pods = self._store.count()
        numbers = {
            "leader": self._may_write(),
            "workqueue_depth": len(self._queue),
            "workqueue_oldest_seconds": self._vitals().queue_oldest_seconds,
            "watch_overdue_seconds": self._watches.overdue_seconds(),
            "jobs": jobs,
            "pods": pods,
        }
        for name, value in numbers.items():
            yield f"grpo_operator_{name}", (), float(value)
        for resource, when in self._watches.last_event_seconds.items():
            yield "grpo_operator_watch_last_event_timestamp_seconds", (resource,), when


def _explain(error: ApiError, server: str) -> str:
    where = f"in namespace {error.namespace}" if error.namespace else "in all namespaces"
    if error.status == 404:
        return (
            f"{server} does not serve {error.resource.name}: the CRD is not installed. Install the chart with crds.enabled=true, or "
            "`kubectl apply --server-side -f crds/grpojobs.grpo.dev.yaml`."
        )
    if error.status == 401:
        return f"{server} does not know who asks (401 {error.message}). Check the ServiceAccount's token or the kubeconfig's user."
    if error.forbidden:
        return (
            f"the operator may not {error.verb} {error.resource.name} {where}. Install the chart with rbac.create=true; to work in some "
            "namespaces only, set rbac.scope=namespaced and name them in rbac.namespaces (the flag --namespaces)."
        )
    return f"{server}: {error}"
