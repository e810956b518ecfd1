"""One round: one operator, one number of jobs, one fresh API server.

Invariant: the phases are the same for both operators, in the same order; what a phase reports is read from the watches, the audit log and
/proc, never from the operator itself.
"""

import asyncio
import json
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from e2e.cluster import ControlPlane
from e2e.cluster.build import build
from e2e.cluster.host import free_ports
from e2e.cluster.processes import processes_of
from e2e.cluster.recipe import CONTROL_PLANE

from benchmarks.operator_scale.client import Client, View
from benchmarks.operator_scale.figures import calls, for_jobs, latencies, tally
from benchmarks.operator_scale.operators import PODS_PER_JOB, Operator, Ours, TrainingOperator
from benchmarks.operator_scale.stage import NAMESPACE, Coordinators, Stage, cpu_seconds

READY_SECONDS = 60.0
START_SECONDS = 1200.0
ANSWER_SECONDS = 60.0
SETTLE_SECONDS = 12.0  # writes that are put off on purpose have happened after that
STEADY_SECONDS = 30.0
EVENTS_A_SECOND = 5.0
EVENTS = 100
RECREATED_PODS = 64
SUBMITTERS = 8

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class AuditLog:
    """Requests of the two service accounts, by what the API server wrote down."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "audit.log"
        policy = directory / "audit-policy.json"
        users = [f"system:serviceaccount:{each.namespace}:{each.account}" for each in (Ours, TrainingOperator)]
        rules: list[dict[str, Any]] = [{"level": "Metadata", "users": users}, {"level": "None"}]
        policy.write_text(
            json.dumps(
                {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": rules}
            )
        )
        self.flags = [f"--audit-policy-file={policy}", f"--audit-log-path={self.path}", "--audit-log-maxsize=1024"]
        self._read = 0

    def since_last(self, user: str) -> Counter[tuple[str, str]]:
        """What came since this was asked before."""
        with self.path.open("rb") as log:
            log.seek(self._read)
            lines, _, _ = log.read().rpartition(b"\n")  # without a last line that is not whole yet
        self._read += len(lines) + bool(lines)
        return tally(lines.decode().splitlines(), user)


def run_round(
    kind: str, jobs: int, *, only_start: bool = False, profile: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """`kind` is "ours" or "peer"; `only_start` ends when all pods run. Raises ClusterError or RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="grpo-operator-scale-") as name:
        directory = Path(name)
        binaries = build((*CONTROL_PLANE, "kube-scheduler", "kwok", "helm"))
        audit = AuditLog(directory)
        with ControlPlane(apiserver_flags=audit.flags) as plane, Stage(plane, binaries / "kwok", directory) as stage:
            (port,) = free_ports(1)
            operator = Ours(plane, directory, port, profile) if kind == "ours" else TrainingOperator(plane, directory)
            operator.install()
            try:
                return asyncio.run(_Round(plane, stage, operator, audit, jobs, port, say).run(only_start))
            except RuntimeError as error:
                log = directory / f"{operator.name}.log"
                words = log.read_text(errors="replace")[-3000:] if log.exists() else ""
                raise RuntimeError(f"{operator.name} with {jobs} jobs: {error}\n{words}") from error
            finally:
                operator.stop(signal.SIGTERM if profile else signal.SIGKILL)


class _Round:
    def __init__(
        self,
        plane: ControlPlane,
        stage: Stage,
        operator: Operator,
        audit: AuditLog,
        jobs: int,
        coordinator_port: int,
        say: Callable[[str], None],
    ) -> None:
        self.plane, self.stage, self.operator, self.audit, self.say = plane, stage, operator, audit, say
        self.jobs = [f"job-{number:03d}" for number in range(jobs)]
        self.coordinators = Coordinators(coordinator_port, 8)
        self.client = Client(plane.kubeconfig)
        self.view = View(operator.shown)
        self.apiserver = next(pid for pid, name in processes_of(plane.directory).items() if name == "kube-apiserver")

    async def run(self, only_start: bool) -> dict[str, Any]:
        async with self.client, self.coordinators:
            watches = [
                asyncio.create_task(self.client.follow(PODS, self.view.take_pod)),
                asyncio.create_task(self.client.follow(self.operator.collection, self.view.take_job)),
            ]
            phases = asyncio.create_task(self._phases(only_start))
            try:
                await asyncio.wait([*watches, phases], return_when=asyncio.FIRST_COMPLETED)
                for watch in watches:
                    if watch.done():
                        watch.result()
                return await phases
            finally:
                for task in (*watches, phases):
                    task.cancel()
                await asyncio.gather(*watches, phases, return_exceptions=True)

    async def _phases(self, only_start: bool) -> dict[str, Any]:
        result: dict[str, Any] = {"operator": self.operator.name, "jobs": len(self.jobs), "pods": self.wanted}
        phases: list[tuple[str, Callable[[], Awaitable[dict[str, Any]]]]] = [
            ("idle", self._idle),
            ("start", self._start_jobs),
        ]
        if not only_start:
            phases.append(("event_to_status", self._events))
            if isinstance(self.operator, Ours):  # the peer knows no steps
                phases += [("steady", self._steady), ("event_to_status_training", self._events)]
            if len(self.jobs) * 8 >= RECREATED_PODS:
                phases.append(("recreate", self._recreate))
            phases += [("restart", self._restart), ("restart_after_kill", self._restart_after_kill)]
        for name, phase in phases:
            began = time.monotonic()
            result[name] = await phase()
            self.stage.check()
            self.say(
                f"{self.operator.name}, {len(self.jobs)} jobs, {name}, {time.monotonic() - began:.0f} s: {result[name]}"
            )
        assert self.operator.running is not None
        peak = max(self.operator.peak_rss_mib, self.operator.running.memory_mib("VmHWM"))
        result["memory"] = {
            "idle_rss_mib": result["idle"]["rss_mib"],
            "after_start_rss_mib": result["start"]["rss_mib"],
            "peak_rss_mib": round(peak, 1),
        }
        return result

    @property
    def wanted(self) -> int:
        return len(self.jobs) * PODS_PER_JOB

    def _rss(self) -> float:
        assert self.operator.running is not None
        return round(self.operator.running.memory_mib(), 1)

    def _all_shown(self) -> bool:
        return len(self.view.running) == self.wanted and sum(self.view.shown.values()) == self.wanted

    # ---- phases

    async def _idle(self) -> dict[str, Any]:
        began = time.monotonic()
        self.operator.start()
        while not self.operator.is_ready():
            if time.monotonic() - began > READY_SECONDS:
                raise RuntimeError(f"not ready after {READY_SECONDS:.0f} s")
            await asyncio.sleep(0.1)
        ready = time.monotonic() - began
        await asyncio.sleep(3)
        return {"ready_seconds": round(ready, 2), "rss_mib": self._rss()}

    async def _start_jobs(self) -> dict[str, Any]:
        self.audit.since_last(self.operator.user)
        cpu, apiserver_cpu, events = self.operator.cpu_seconds(), cpu_seconds(self.apiserver), self.view.pod_events
        began = time.monotonic()
        waiting = iter(self.jobs)

        async def submit() -> None:
            for name in waiting:
                await self.client.create(self.operator.collection, self.operator.job(name))

        submitting = asyncio.gather(*(submit() for _ in range(SUBMITTERS)))
        exist = asyncio.create_task(
            self.view.until(lambda: len(self.view.pods) == self.wanted, "all pods exist", START_SECONDS)
        )
        await submitting
        submitted = time.monotonic()
        existed = await exist
        shown = await self.view.until(self._all_shown, "all pods run and are in the status", START_SECONDS)
        while time.monotonic() - max(shown, self.view.last_change) < 2:
            await asyncio.sleep(0.5)
        cpu, apiserver_cpu = self.operator.cpu_seconds() - cpu, cpu_seconds(self.apiserver) - apiserver_cpu
        await asyncio.sleep(SETTLE_SECONDS)
        counts = self.audit.since_last(self.operator.user)
        events = self.view.pod_events - events
        return {
            "submitted_seconds": round(submitted - began, 2),
            "all_pods_exist_seconds": round(existed - began, 2),
            "all_seen_running_seconds": round(shown - began, 2),
            "cpu_seconds": round(cpu, 2),
            "apiserver_cpu_seconds": round(apiserver_cpu, 2),
            "rss_mib": self._rss(),
            "pod_events": events,
            "calls_per_job": round(for_jobs(counts) / len(self.jobs), 2),
            "calls_per_pod_event": round(for_jobs(counts) / events, 3),
            "calls": calls(counts),
        }

    async def _steady(self) -> dict[str, Any]:
        self.coordinators.train()
        await asyncio.sleep(SETTLE_SECONDS)  # the first steps are written at once
        self.audit.since_last(self.operator.user)
        cpu, polls = self.operator.cpu_seconds(), self.coordinators.polls
        began = time.monotonic()
        await asyncio.sleep(STEADY_SECONDS)
        seconds = time.monotonic() - began
        counts = self.audit.since_last(self.operator.user)
        return {
            "seconds": round(seconds, 1),
            "cpu_share": round((self.operator.cpu_seconds() - cpu) / seconds, 4),
            "calls_per_job_per_minute": round(for_jobs(counts) / len(self.jobs) * 60 / seconds, 2),
            "calls_by_verb": calls(counts)["by_verb"],
            "status_polls_per_second": round((self.coordinators.polls - polls) / seconds, 1),
            "rss_mib": self._rss(),
        }

    async def _events(self) -> dict[str, Any]:
        """A pod stops being at work and is at work again: until the status says so."""
        self.audit.since_last(self.operator.user)
        cpu = self.operator.cpu_seconds()
        targets = [(job, n) for n in range(8) for job in self.jobs][: EVENTS // 2]
        locks = {job: asyncio.Lock() for job in self.jobs}
        seconds: list[float] = []

        async def disturb(job: str, pod: str) -> None:
            async with locks[job]:
                for works in (False, True):
                    seconds.append(await self._disturb(job, pod, works))

        running = []
        for job, number in targets:
            running.append(asyncio.create_task(disturb(job, self.operator.replaceable(job)[number])))
            await asyncio.sleep(2 / EVENTS_A_SECOND)
        await asyncio.gather(*running)
        cpu = self.operator.cpu_seconds() - cpu
        await asyncio.sleep(SETTLE_SECONDS)
        counts = self.audit.since_last(self.operator.user)
        return latencies(seconds) | {
            "calls_per_event": round(for_jobs(counts) / len(seconds), 2),
            "calls_by_verb": calls(counts)["by_verb"],
            "cpu_milliseconds_per_event": round(cpu / len(seconds) * 1000, 2),
        }

    async def _disturb(self, job: str, pod: str, works: bool) -> float:
        wanted = PODS_PER_JOB if works else PODS_PER_JOB - 1
        began = time.monotonic()
        await self.client.patch_status(f"{PODS}/{pod}", self.operator.at_work(works))
        seen = await self.view.until(
            lambda: self.view.shown[job] == wanted, f"the status of {job} shows {wanted} pods at work", ANSWER_SECONDS
        )
        return seen - began

    async def _recreate(self) -> dict[str, Any]:
        """Eight pods each of eight jobs are deleted, without grace."""
        names = [pod for job in self.jobs[: RECREATED_PODS // 8] for pod in self.operator.replaceable(job)]
        old = {name: self.view.pods[name] for name in names}
        self.audit.since_last(self.operator.user)
        began = time.monotonic()
        await asyncio.gather(*(self.client.delete_at_once(f"{PODS}/{name}") for name in names))

        def all_new() -> bool:
            return all(self.view.pods.get(name, uid) != uid for name, uid in old.items())

        existed = await self.view.until(all_new, "all deleted pods exist anew", START_SECONDS)
        shown = await self.view.until(self._all_shown, "all new pods are in the status", START_SECONDS)
        await asyncio.sleep(SETTLE_SECONDS)
        return {
            "pods": len(names),
            "all_pods_exist_seconds": round(existed - began, 2),
            "all_seen_running_seconds": round(shown - began, 2),
            "calls_by_verb": calls(self.audit.since_last(self.operator.user))["by_verb"],
        }

    async def _restart(self) -> dict[str, Any]:
        """It is stopped as Kubernetes does, and started."""
        return await self._start_anew(signal.SIGTERM)

    async def _restart_after_kill(self) -> dict[str, Any]:
        """It is killed, so that nothing is given back, and started."""
        return await self._start_anew(signal.SIGKILL)

    async def _start_anew(self, number: int) -> dict[str, Any]:
        """While it is away a pod of every job stops being at work: all is taken in when every status says so."""
        await asyncio.to_thread(self.operator.stop, number)
        for group in _groups(self.jobs, SUBMITTERS):
            await asyncio.gather(*(self._silence(job) for job in group))
        await asyncio.sleep(1)
        self.audit.since_last(self.operator.user)
        cpu = self.operator.cpu_seconds()
        began = time.monotonic()
        self.operator.start()
        resynced = asyncio.create_task(
            self.view.until(
                lambda: all(self.view.shown[job] == PODS_PER_JOB - 1 for job in self.jobs),
                "every status is right again",
                START_SECONDS,
            )
        )
        ready = None
        while not resynced.done():
            if ready is None and await asyncio.to_thread(self.operator.is_ready):
                ready = time.monotonic() - began
            await asyncio.sleep(0.1)
        seconds = (await resynced) - began
        result: dict[str, Any] = {
            "ready_seconds": None if ready is None else round(ready, 2),
            "resynced_seconds": round(seconds, 2),
            "cpu_seconds": round(self.operator.cpu_seconds() - cpu, 2),
            "rss_mib": self._rss(),
        }
        await asyncio.sleep(1)
        result["calls"] = calls(self.audit.since_last(self.operator.user))
        for job in self.jobs:
            await self.client.patch_status(f"{PODS}/{self._last(job)}", self.operator.at_work(True))
        await self.view.until(self._all_shown, "all pods are at work again", START_SECONDS)
        return result

    async def _silence(self, job: str) -> None:
        await self.client.patch_status(f"{PODS}/{self._last(job)}", self.operator.at_work(False))

    def _last(self, job: str) -> str:
        return self.operator.replaceable(job)[-1]


def _groups(names: list[str], size: int) -> Iterable[list[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))
