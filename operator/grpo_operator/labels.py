"""Labels and names of a job's children.

Invariant: a name or label key stands here once. Names are deterministic, so a second operator or a second try makes the same children.
"""

from enum import StrEnum

from grpo_worker.config.job import GROUP

MANAGER = "grpo-operator"  # also the field manager of server-side apply
CONTAINER = "worker"

MANAGED_BY = "app.kubernetes.io/managed-by"
APP_NAME = "app.kubernetes.io/name"
APP_INSTANCE = "app.kubernetes.io/instance"
JOB = f"{GROUP}/job"
JOB_UID = f"{GROUP}/job-uid"
ROLE = f"{GROUP}/role"
INDEX = f"{GROUP}/index"
ATTEMPT = f"{GROUP}/attempt"
CONFIG = f"{GROUP}/config"


class Role(StrEnum):
    """What a pod of a job does."""

    COORDINATOR = "coordinator"
    TRAINER = "trainer"
    ROLLOUT = "rollout"


def member_name(role: Role, index: int) -> str:
    """Name within the job and host name of the pod: `coordinator`, `trainer-0`, `rollout-1`."""
    return role.value if role is Role.COORDINATOR else f"{role.value}-{index}"


def pod_name(job: str, role: Role, index: int) -> str:
    return f"{job}-{member_name(role, index)}"


def service_name(job: str) -> str:
    return job


def token_secret_name(job: str) -> str:
    return f"{job}-token"


def job_labels(job: str, uid: str) -> dict[str, str]:
    """On every child of a job."""
    return {MANAGED_BY: MANAGER, APP_NAME: "grpo-job", APP_INSTANCE: job, JOB: job, JOB_UID: uid}
