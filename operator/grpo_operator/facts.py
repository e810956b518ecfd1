"""What a plan is made from: the job, its pods and the coordinator's word, as plain immutable values.

Invariant: nothing here knows the API client; `control/read_job.py` and `control/read_pod.py` read these from API objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from grpo_operator.labels import Role
from grpo_worker.config import Spec
from grpo_worker.config.status import GRPOJobStatus


@dataclass(frozen=True)
class Job:
    """A GRPOJob. `spec` is None when the document is not valid (then `invalid` says why)."""

    name: str
    namespace: str
    uid: str
    generation: int
    created: datetime
    spec: Spec | None
    status: GRPOJobStatus
    document: dict[str, Any] = field(repr=False, compare=False)  # apiVersion, kind, metadata, spec as stored
    invalid: str = ""
    deleting: bool = False


@dataclass(frozen=True)
class LastWord:
    """The termination message of a process (see `grpo_worker.entrypoint`)."""

    reason: str
    message: str
    step: int | None = None
    checkpoint: str | None = None
    # as in `/status`: epoch, reward, accuracy, ...
    progress: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Ended:
    """How a pod's process ended. `kube_reason`: Completed, Error, OOMKilled, Evicted, ..."""

    exit_code: int | None  # None: the container never ran, or nobody knows
    kube_reason: str
    finished: datetime | None
    last_word: LastWord | None
    message: str = ""  # Kubernetes' own words, or a termination message that is not JSON


@dataclass(frozen=True)
class Waiting:
    """Why a container does not run yet: ImagePullBackOff, CreateContainerConfigError, ContainerCreating, ..."""

    reason: str
    message: str


@dataclass(frozen=True)
class Pod:
    """One pod of the job."""

    name: str
    uid: str
    role: Role
    index: int
    attempt: int
    created: datetime
    phase: str  # Pending, Running, Succeeded, Failed, Unknown
    ip: str = ""
    node: str = ""
    config: str = ""  # name of the ConfigMap that it mounts
    scheduled: bool = False
    unschedulable: str = ""  # the scheduler's words
    started: bool = False  # its container runs or has run
    ready: bool = False
    waiting: Waiting | None = None
    ended: Ended | None = None
    disruption: str = ""  # reason of the DisruptionTarget condition: preemption, eviction, node taint
    conditions: tuple[str, ...] = ()  # types of the conditions that are True
    deletion_deadline: datetime | None = None  # being deleted: when its grace ends

    @property
    def deleting(self) -> bool:
        return self.deletion_deadline is not None

    @property
    def over(self) -> bool:
        """Nothing of it runs, and its devices are free; a sidecar may outlive the worker."""
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True)
class Refusal:
    """The API server did not take an object of the job: a quota, a LimitRange, Pod Security, a webhook, or it is no valid pod."""

    what: str  # "Service demo", "Pod demo-trainer-0"
    message: str  # the API server's words
    member: tuple[Role, int] | None = None  # of a pod
    invalid: bool = False  # no such pod will ever be taken (422)


@dataclass(frozen=True)
class Report:
    """The coordinator's `/status`, and when it was read. `document` is as described in `grpo_worker.coordinator.progress`."""

    pod_uid: str
    read: datetime
    document: dict[str, Any]


@dataclass(frozen=True)
class Observation:
    """Everything a plan may look at."""

    job: Job
    pods: tuple[Pod, ...] = ()
    config_maps: tuple[str, ...] = ()  # the job's
    refusals: tuple[Refusal, ...] = ()  # of objects that were to be made last time
    report: Report | None = None  # the newest, of the present coordinator pod; None before its first answer
