"""`grpo logs`: what the pods of a job print, also over pods that are replaced.

Invariant: every line is printed once, in the order of its pod; nothing waits without a limit. Kubernetes keeps the log of a pod as long
as the pod itself: what a replaced pod printed is gone with it.
"""

import argparse
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_operator import labels
from grpo_operator.cli.api_errors import NotThere
from grpo_operator.cli.cluster import Cluster, Json, connect, transient
from grpo_operator.cli.reading import ended, entries, part, status_of
from grpo_worker.errors import GRPOError, RetryableError, StalledError, UsageError
from grpo_worker.logs import readable

POLL_SECONDS = 2.0
MEMBER_SECONDS = 600.0  # longest wait for a pod to follow
QUEUED_LINES = 1000
LAST_WORD_CHARACTERS = 300


@dataclass(frozen=True)
class Wanted:
    """Which pods."""

    job: str
    role: str
    index: int | None
    attempt: int | None

    @property
    def selector(self) -> str:
        terms = {labels.JOB: self.job}
        if self.role != "all":
            terms[labels.ROLE] = self.role
        if self.index is not None:
            terms[labels.INDEX] = str(self.index)
        if self.attempt is not None:
            terms[labels.ATTEMPT] = str(self.attempt)
        return ",".join(f"{key}={value}" for key, value in terms.items())

    @property
    def one(self) -> bool:
        """Whether there is only one such pod at a time."""
        return self.role == "coordinator" or (self.role != "all" and self.index is not None)

    def __str__(self) -> str:
        member = "any role" if self.role == "all" else f"role {self.role}"
        index = "" if self.index is None else f", index {self.index}"
        return member + index + ("" if self.attempt is None else f", attempt {self.attempt}")


def logs(options: argparse.Namespace) -> None:
    """Raises GRPOError when no log can be read."""
    if options.role == "all" and options.index is not None:
        raise UsageError("--index needs one --role: trainer or rollout")
    cluster = connect(options)
    job = cluster.job(cluster.namespace, options.name)
    wanted = Wanted(options.name, options.role, options.index, options.attempt)
    if options.follow:
        _follow(cluster, wanted, options.tail)
    else:
        _print(cluster, wanted, job, options.tail)


def member_of(pod: Json) -> str:
    """`coordinator`, `trainer-0`, `rollout-1`."""
    marks = part(pod, "metadata", "labels")
    role = str(marks.get(labels.ROLE, ""))
    return role if role == labels.Role.COORDINATOR else f"{role}-{marks.get(labels.INDEX, '')}"


def has_started(pod: Json) -> bool:
    """Whether its container runs or has run, so that there is a log."""
    return bool({"running", "terminated"} & _container_state(pod).keys())


def has_ended(pod: Json) -> bool:
    return "terminated" in _container_state(pod) or part(pod, "status").get("phase") in ("Succeeded", "Failed")


def _container_state(pod: Json) -> Mapping[str, Any]:
    """`state` of the worker's container status: a mapping of one key."""
    containers = entries(part(pod, "status"), "containerStatuses")
    return next((part(entry, "state") for entry in containers if entry.get("name") == labels.CONTAINER), {})


def waits_for(pod: Json) -> str:
    """Why a pod has not started, in words."""
    if waiting := part(_container_state(pod), "waiting"):
        return ": ".join(str(waiting[key]) for key in ("reason", "message") if waiting.get(key))
    for condition in entries(part(pod, "status"), "conditions"):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"not scheduled: {condition.get('message') or condition.get('reason')}"
    return f"phase {part(pod, 'status').get('phase', 'unknown')}"


def no_pods(job: Json, wanted: Wanted) -> str:
    """Why there is nothing to print: what the status remembers of pods that are gone."""
    status = status_of(job)
    text = f"No log of {wanted.job} to read now ({wanted}); its state is {status.get('state') or 'Pending'}."
    roles = (wanted.role,) if wanted.role != "all" else tuple(labels.Role)
    gone = [
        f"  {entry.get('time')} {entry.get('pod')}: exit code {entry.get('exitCode')}, {entry.get('reason')}: "
        f"{str(entry.get('message') or '')[:LAST_WORD_CHARACTERS]}"
        for entry in entries(status, "failures")
        if entry.get("role") in roles
    ]
    return "\n".join([text, "Last words of pods that are gone:", *gone]) if gone else text


def _print(cluster: Cluster, wanted: Wanted, job: Json, tail: int | None) -> None:
    pods = sorted(cluster.pods(cluster.namespace, wanted.selector), key=member_of)
    if not pods:
        raise NotThere(no_pods(job, wanted))
    several = len(pods) > 1
    problems: list[GRPOError] = []
    for pod in pods:
        member = member_of(pod)
        if not has_started(pod):
            problems.append(RetryableError(f"{member} has not started: {waits_for(pod)}"))
            continue
        try:
            for line in cluster.log(cluster.namespace, pod["metadata"]["name"], _query(tail)):
                print(f"{member}  {readable(line)}" if several else readable(line))
        except GRPOError as error:
            problems.append(error)
    for problem in problems[:-1] if len(problems) == len(pods) else problems:
        print(f"grpo: {problem}", file=sys.stderr)
    if len(problems) == len(pods):
        raise problems[-1]


class _PodReader(threading.Thread):
    """Follows one pod's log into the queue until the pod has ended or is gone."""

    def __init__(self, cluster: Cluster, pod: Json, tail: int | None, lines: "queue.Queue[tuple[str, str]]") -> None:
        super().__init__(daemon=True, name=f"log of {pod['metadata']['name']}")
        self.member = member_of(pod)
        self.problem = ""
        self._cluster = cluster
        self._pod = str(pod["metadata"]["name"])
        self._uid = str(pod["metadata"]["uid"])
        self._tail = tail
        self._lines = lines
        self._last = ""  # timestamp of the last line that was passed on

    def run(self) -> None:
        failing_since: float | None = None
        while True:
            before = self._last
            try:
                for line in self._fresh():
                    self._lines.put((self.member, line))
                if self._over():
                    return
                failing_since = None
            except NotThere:
                return
            except GRPOError as error:
                now = time.monotonic()
                failing_since = now if failing_since is None or self._last != before else failing_since
                if not transient(error) or now - failing_since > MEMBER_SECONDS:
                    self.problem = str(error)
                    return
            time.sleep(POLL_SECONDS)

    def _over(self) -> bool:
        """Whether the container has ended: a stream that ends may also be one that broke on its way here. Raises NotThere."""
        pod = self._cluster.pod(self._cluster.namespace, self._pod)
        return pod["metadata"]["uid"] != self._uid or has_ended(pod)

    def _fresh(self) -> Iterator[str]:
        """Lines after the last one. Kubernetes begins at a whole second, so lines of that second come again."""
        since = {"sinceTime": self._last} if self._last else {}
        tail = None if self._last else self._tail
        known = self._last
        for stamped in self._cluster.log(
            self._cluster.namespace, self._pod, {**_query(tail), **since, "follow": True, "timestamps": True}
        ):
            stamp, _, line = stamped.partition(" ")
            if known and stamp <= known:
                continue
            self._last = stamp
            yield line


def _follow(cluster: Cluster, wanted: Wanted, tail: int | None) -> None:
    """Print until the job has ended and every log is at its end."""
    lines: queue.Queue[tuple[str, str]] = queue.Queue(QUEUED_LINES)
    readers: dict[str, _PodReader] = {}
    told: set[str] = set()
    next_look, last_seen = 0.0, time.monotonic()
    job: Json = {}
    while True:
        now = time.monotonic()
        if now >= next_look:
            next_look = now + POLL_SECONDS
            looked = _look(cluster, wanted, told)
            if looked is not None:
                job, pods = looked
                for pod in pods:
                    uid = str(pod["metadata"]["uid"])
                    if uid not in readers and has_started(pod):
                        # A replacement is read from its first line.
                        reader = _PodReader(cluster, pod, None if _known(readers, pod) else tail, lines)
                        readers[uid] = reader
                        reader.start()
        running = any(reader.is_alive() for reader in readers.values())
        _tell_problems(readers, told)
        _print_queued(lines, wanted)
        if running:
            last_seen = now
        elif lines.empty():
            if job and ended(job) is not None:
                if not readers:
                    raise NotThere(f"{wanted.job} ended, and no pod ({wanted}) had started. {no_pods(job, wanted)}")
                return
            if now - last_seen > MEMBER_SECONDS:
                raise StalledError(f"no pod of {wanted.job} ({wanted}) has started for {MEMBER_SECONDS:.0f} s.")


def _look(cluster: Cluster, wanted: Wanted, told: set[str]) -> tuple[Json, list[Json]] | None:
    """The job and its pods; None when the API server does not answer now."""
    try:
        job = cluster.job(cluster.namespace, wanted.job)
        pods = cluster.pods(cluster.namespace, wanted.selector)
    except GRPOError as error:
        if not transient(error):
            raise
        _tell(f"{error} Trying again.", told)
        return None
    for pod in pods:
        if not has_started(pod):
            _tell(f"{member_of(pod)} has not started: {waits_for(pod)}", told)
    if not pods and ended(job) is None:
        _tell(f"waiting for a pod ({wanted})", told)
    return job, pods


def _known(readers: dict[str, _PodReader], pod: Json) -> bool:
    return any(reader.member == member_of(pod) for reader in readers.values())


def _print_queued(lines: "queue.Queue[tuple[str, str]]", wanted: Wanted) -> None:
    """Print what is there; wait a moment for the first line."""
    try:
        member, line = lines.get(timeout=0.2)
        while True:
            print(readable(line) if wanted.one else f"{member}  {readable(line)}", flush=lines.empty())
            member, line = lines.get_nowait()
    except queue.Empty:
        return


def _tell_problems(readers: dict[str, _PodReader], told: set[str]) -> None:
    for reader in readers.values():
        if reader.problem:
            _tell(f"{reader.member}: {reader.problem}", told)


def _tell(message: str, told: set[str]) -> None:
    """Say it once, on stderr."""
    if message not in told:
        told.add(message)
        print(f"grpo: {message}", file=sys.stderr)


def _query(tail: int | None) -> dict[str, str | int | bool]:
    return {} if tail is None else {"tailLines": tail}
