"""`spec.runtime`: what the processes of a job find around them: image, volumes, resources, environment."""

from typing import Annotated, Literal

from pydantic import Field

from grpo_worker.config.base import Quantity, Role, Section, field
from grpo_worker.config.pod_template import PodTemplates

_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_PART = r"\.{0,2}[A-Za-z0-9_-][A-Za-z0-9._-]*"  # of a path: neither `.` nor `..`
_RELATIVE_PATH = rf"^{_PART}(/{_PART})*$"
_ABSOLUTE_PATH = rf"^(/{_PART})+$"

# Names and paths of what the operator mounts itself.
RESERVED_VOLUME_NAMES = frozenset({"workspace", "config", "tmp", "home", "shm"})
RESERVED_MOUNT_PATHS = frozenset(
    {"/workspace", "/etc", "/etc/grpo", "/dev", "/dev/shm", "/home/grpo", "/proc", "/sys", "/tmp"}
)


def is_reserved_mount_path(path: str) -> bool:
    return path in RESERVED_MOUNT_PATHS or path.startswith(("/etc/grpo/", "/dev/shm/"))


ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=_NAME)]
ResourceName = Annotated[str, Field(min_length=1, max_length=253)]


class KeyRef(Section):
    """A key of a Secret or ConfigMap in the job's namespace."""

    name: ObjectName = field(..., "Name of the object.")
    key: str = field(..., "Key in it.", min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")


class EnvVarSource(Section):
    """Where a variable's value comes from: exactly one of the two."""

    secret_key_ref: KeyRef | None = field(None, "A key of a Secret.")
    config_map_key_ref: KeyRef | None = field(None, "A key of a ConfigMap.")


class EnvVar(Section):
    """One environment variable: a name, and exactly one of value and valueFrom."""

    name: str = field(..., "Name.", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)
    value: str | None = field(None, "Value; files of the run hold names alone.", max_length=32768)
    value_from: EnvVarSource | None = field(
        None, "A Secret's or ConfigMap's key; `grpo run` takes the variable of the same name from its own environment."
    )


class ObjectRef(Section):
    """An object in the job's namespace."""

    name: ObjectName = field(..., "Name of the object.")


class EnvFromSource(Section):
    """A Secret or ConfigMap whose keys all become variables: exactly one of the two."""

    secret_ref: ObjectRef | None = field(None, "A Secret.", cluster=True)
    config_map_ref: ObjectRef | None = field(None, "A ConfigMap.", cluster=True)


class Workspace(Section):
    """The volume that all pods share: paths of the document are relative to it, the run's directory is below it."""

    claim_name: ObjectName = field(..., "PersistentVolumeClaim; ReadWriteMany, unless all pods run on one node.")
    sub_path: str | None = field(
        None, "Directory of the volume; default its root.", pattern=_RELATIVE_PATH, max_length=512
    )


class Volume(Section):
    """One more PersistentVolumeClaim, in every pod."""

    name: str = field(..., "Name of the volume in the pod.", pattern=_LABEL, max_length=63)
    claim_name: ObjectName = field(..., "PersistentVolumeClaim.")
    mount_path: str = field(..., "Where it is mounted, e.g. /data.", pattern=_ABSOLUTE_PATH, max_length=512)
    sub_path: str | None = field(
        None, "Directory of the volume; default its root.", pattern=_RELATIVE_PATH, max_length=512
    )
    read_only: bool = field(True, "Mount it read-only.")


class ResourceRequirements(Section):
    """Requests and limits of one pod. GPUs need no entry: trainer.gpusPerNode and rollout.tensorParallelSize ask for them."""

    requests: dict[ResourceName, Quantity] = field(
        dict, "Reserved for the pod, e.g. cpu: 8, memory: 64Gi.", cluster=True
    )
    limits: dict[ResourceName, Quantity] = field(dict, "Most that the pod may use.", cluster=True)


class Resources(Section):
    """Requests and limits by role."""

    coordinator: ResourceRequirements | None = field(None, "Of the coordinator pod.", cluster=True)
    trainer: ResourceRequirements | None = field(None, "Of each trainer pod: all ranks of a node.", cluster=True)
    rollout: ResourceRequirements | None = field(None, "Of each rollout pod.", cluster=True)

    def of(self, role: Role) -> ResourceRequirements:
        by_role = {"coordinator": self.coordinator, "trainer": self.trainer, "rollout": self.rollout}
        return by_role[role] or ResourceRequirements()


class Runtime(Section):
    """What processes find around them: the machine, and on a cluster the pod."""

    device: Literal["auto", "cpu", "cuda"] = field(
        "auto",
        "auto is cuda where there is a GPU; on a cluster auto and cuda ask for nvidia.com/gpu, cpu does not.",
        verl="trainer.device",
    )
    cpu_threads: int | None = field(
        None,
        "Threads of each process on CPU; default the machine's cores over its processes.",
        unit="threads",
        ge=1,
        le=4096,
    )
    env: list[EnvVar] = field(
        list, "Environment of every process of the job.", verl="ray_kwargs.ray_init.runtime_env", max_length=128
    )
    env_from: list[EnvFromSource] = field(
        list,
        "Secrets and ConfigMaps whose keys become variables of every process; for `grpo run`, export them in the shell that starts it.",
        cluster=True,
        max_length=32,
    )
    image: str | None = field(
        None, "Container image; default the operator's --worker-image.", cluster=True, min_length=1, max_length=512
    )
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = field(
        "IfNotPresent", "When the image is pulled.", cluster=True
    )
    image_pull_secrets: list[ObjectName] = field(
        list, "Secrets with the registry's credentials.", cluster=True, max_length=16
    )
    workspace: Workspace | None = field(
        None,
        "The shared working directory, mounted at /workspace; a job on a cluster needs one. Relative paths of the document "
        "mean the same in it as under `grpo run` started there.",
        cluster=True,
    )
    volumes: list[Volume] = field(
        list, "Further volumes, e.g. data sets and model weights.", cluster=True, max_length=32
    )
    shm_size: Quantity = field(
        "8Gi", "Size of /dev/shm (memory that counts against the pod's limit); NCCL and vLLM use it.", cluster=True
    )
    resources: Resources = field(Resources, "Requests and limits by role.")
    pod_template: PodTemplates = field(PodTemplates, "Patches onto the pods, for what has no field here.")
    termination_grace_period_seconds: int = field(
        300, "Time that a pod has to save and stop.", unit="seconds", ge=1, le=86400, cluster=True
    )
