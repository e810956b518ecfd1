"""The operator's picture of the cluster: its jobs and their pods.

Invariant: per object the newest version wins, whoever brought it (the watch, a list, or the answer to one of the operator's own requests);
what has been seen gone never comes back. So a plan made after a write sees that write. Only the operator's main loop touches it. A pod is a
job's when its namespace, its owner, its labels and its name all say so: labels alone can be put on any pod.

resourceVersions are compared as numbers, which Kubernetes guarantees for its own kinds and for custom resources (KEP-5504).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_operator import labels
from grpo_operator.facts import Job, Pod

logger = logging.getLogger(__name__)

Document = dict[str, Any]
REMEMBERED_GONE = 10_000  # uids


class Key(NamedTuple):
    """A job by name; what the work queue holds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class _HeldJob:
    version: int
    job: Job


@dataclass(frozen=True)
class _HeldPod:
    version: int
    job: Key
    job_uid: str
    pod: Pod


def version_of(document: Document) -> int:
    return int(document["metadata"].get("resourceVersion") or 0)


def is_owned(document: Document, job_uid: str) -> bool:
    """Whether the job controls the object; the API server allows one controller."""
    owners = document["metadata"].get("ownerReferences") or ()
    return any(owner.get("controller") and owner.get("uid") == job_uid for owner in owners)


def _check_owner(document: Document, pod: Pod, job_name: str, job_uid: str) -> None:
    """Raises ValueError."""
    if not is_owned(document, job_uid):
        raise ValueError(f"pod {pod.name}: its labels name job {job_name or '(none)'}, its owner references do not")
    if pod.name != labels.pod_name(job_name, pod.role, pod.index):
        raise ValueError(f"pod {pod.name}: no {pod.role.value} {pod.index} of job {job_name} is called so")


class Store:
    """Jobs by name, pods by the uid of their job."""

    def __init__(self, read_job: Callable[[Document], Job], read_pod: Callable[[Document], Pod]) -> None:
        self._read_job, self._read_pod = read_job, read_pod
        self._jobs: dict[Key, _HeldJob] = {}
        self._pods: dict[str, _HeldPod] = {}
        self._pods_of: dict[str, dict[str, _HeldPod]] = {}
        self._config_maps: dict[str, set[str]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()

    # ---- jobs

    def update_job(self, document: Document) -> Key | None:
        """The job's key when this is news, else None."""
        metadata, version = document["metadata"], version_of(document)
        key = Key(metadata["namespace"], metadata["name"])
        held = self._jobs.get(key)
        if metadata["uid"] in self._gone or (held is not None and held.version >= version):
            return None
        if held is not None and held.job.uid != metadata["uid"]:
            self._forget_job(held.job.uid, held.version)
        slim = {name: value for name, value in metadata.items() if name != "managedFields"}
        self._jobs[key] = _HeldJob(version, self._read_job(document | {"metadata": slim}))
        return key

    def remove_job(self, key: Key, uid: str, version: int = 0) -> bool:
        """Whether it was here."""
        held = self._jobs.get(key)
        present = held is not None and held.job.uid == uid
        if present:
            del self._jobs[key]
        self._forget_job(uid, version)
        return present

    def _forget_job(self, uid: str, version: int) -> None:
        self._note_gone(uid, version)
        self._config_maps.pop(uid, None)

    def job(self, key: Key) -> Job | None:
        held = self._jobs.get(key)
        return None if held is None else held.job

    def jobs(self) -> Iterator[Key]:
        return iter(tuple(self._jobs))

    # ---- pods

    def update_pod(self, document: Document) -> Key | None:
        """The key of the pod's job when this is news, else None."""
        metadata, version = document["metadata"], version_of(document)
        uid = metadata["uid"]
        held = self._pods.get(uid)
        if uid in self._gone or (held is not None and held.version >= version):
            return None
        tags = metadata.get("labels") or {}
        job_uid, job_name = tags.get(labels.JOB_UID, ""), tags.get(labels.JOB, "")
        try:
            pod = self._read_pod(document)
            _check_owner(document, pod, job_name, job_uid)
        except ValueError as error:  # carries the operator's labels, but somebody else made or changed it
            logger.warning("Ignored: %s", error)
            dropped = self._drop_pod(uid)
            self._gone.pop(uid, None)  # it is there, and may become ours again
            return None if dropped is None else dropped.job
        new = _HeldPod(version, Key(metadata["namespace"], job_name), job_uid, pod)
        siblings = self._pods_of.setdefault(job_uid, {})
        for other_uid, other in tuple(siblings.items()):
            if other.pod.name == pod.name and other_uid != uid and other.version < version:
                self._drop_pod(other_uid)  # a name is free only when its old pod is gone
        self._pods[uid] = new
        self._pods_of.setdefault(job_uid, {})[uid] = new
        if pod.config:
            self.note_config_map(job_uid, pod.config)
        return new.job

    def remove_pod(self, uid: str, version: int = 0) -> Key | None:
        """The key of the pod's job when it was here, else None."""
        held = self._drop_pod(uid)
        self._note_gone(uid, version)
        return None if held is None else held.job

    def _drop_pod(self, uid: str) -> _HeldPod | None:
        held = self._pods.pop(uid, None)
        if held is not None:
            siblings = self._pods_of[held.job_uid]
            del siblings[uid]
            if not siblings:
                del self._pods_of[held.job_uid]
            self._note_gone(uid, held.version)
        return held

    def pods(self, job: Job) -> tuple[Pod, ...]:
        """Of one job, by name."""
        held = self._pods_of.get(job.uid, {}).values()
        own = (item.pod for item in held if item.job == Key(job.namespace, job.name))
        return tuple(sorted(own, key=lambda pod: pod.name))

    def count(self) -> tuple[int, int]:
        """Jobs and pods."""
        return len(self._jobs), len(self._pods)

    # ---- config maps: known by use, so that the operator needs no right to read any

    def note_config_map(self, job_uid: str, name: str) -> None:
        if job_uid not in self._gone:
            self._config_maps.setdefault(job_uid, set()).add(name)

    def forget_config_map(self, job_uid: str, name: str) -> None:
        self._config_maps.get(job_uid, set()).discard(name)

    def config_maps(self, job_uid: str) -> tuple[str, ...]:
        """Those that the operator made or saw on a pod since it started, and has not deleted."""
        return tuple(sorted(self._config_maps.get(job_uid, ())))

    # ---- lists

    def absent_jobs(self, listed: Iterable[str], list_version: int) -> list[tuple[Key, str]]:
        """Held jobs whose uid a complete list of that version lacks: they went without the watch telling."""
        there = set(listed)
        return [
            (key, held.job.uid)
            for key, held in self._jobs.items()
            if held.version <= list_version and held.job.uid not in there
        ]

    def absent_pods(self, listed: Iterable[str], list_version: int) -> list[str]:
        """uids of held pods that a complete list of that version lacks."""
        there = set(listed)
        return [uid for uid, held in self._pods.items() if held.version <= list_version and uid not in there]

    def _note_gone(self, uid: str, version: int) -> None:
        self._gone[uid] = version
        self._gone.move_to_end(uid)
        while len(self._gone) > REMEMBERED_GONE:
            self._gone.popitem(last=False)
