"""What a plan asks for, as plain values.

Invariant: a plan is complete: executing its parts in the order of its fields, stopping at any of them and planning again from what the
API server then holds, ends in the same state.
"""

from dataclasses import dataclass, field
from typing import Literal

from grpo_operator.labels import Role
from grpo_worker.config.status import GRPOJobStatus


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event on the GRPOJob, in words."""

    type: Literal["Normal", "Warning"]
    reason: str  # CamelCase
    message: str


@dataclass(frozen=True)
class DeletePod:
    """Delete this very pod (uid is a precondition). `grace_seconds` None: the pod's own; 0: at once, without the kubelet's word."""

    name: str
    uid: str
    grace_seconds: int | None = None


@dataclass(frozen=True)
class CreatePod:
    """Make a pod for the plan's status (attempt, excluded nodes, config)."""

    role: Role
    index: int


@dataclass(frozen=True)
class Plan:
    """The next actions for one job, in order."""

    status: GRPOJobStatus | None = None  # None: as it is
    events: tuple[Event, ...] = ()  # sent after the status is written
    stop_coordinator: str = ""  # name of the coordinator pod that is asked to save and stop
    delete_pods: tuple[DeletePod, ...] = ()
    apply_shared: bool = False  # Service, ConfigMap, Secret, NetworkPolicy, PodDisruptionBudget
    create_pods: tuple[CreatePod, ...] = ()
    delete_config_maps: tuple[str, ...] = ()
    delete_job: bool = False
    requeue_after_seconds: float | None = field(default=None)
