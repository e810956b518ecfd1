"""One pod of a job.

Invariant: a pod satisfies the `restricted` Pod Security Standard unless the document asks for RDMA or patches it, holds no Kubernetes
credentials, and is never restarted in place: the operator replaces it, so its end is seen and counted once.
"""

from typing import Any

from grpo_operator.build.config import DIRECTORY, FILE, config_hash
from grpo_operator.build.environment import TERMINATION_LOG_PATH, environment, environment_from
from grpo_operator.build.errors import spec_of
from grpo_operator.build.metadata import object_meta
from grpo_operator.build.patch import patched
from grpo_operator.build.ports import ports_of
from grpo_operator.build.resources import capabilities, resources
from grpo_operator.build.scheduling import keep_away, scheduling
from grpo_operator.build.volumes import WORKSPACE, volumes
from grpo_operator.facts import Job
from grpo_operator.labels import ATTEMPT, CONFIG, CONTAINER, INDEX, ROLE, Role, member_name, pod_name, service_name
from grpo_operator.settings import Settings
from grpo_worker.config import Spec
from grpo_worker.config.status import GRPOJobStatus

USER_ID = 65532  # of the worker image
READINESS = {Role.COORDINATOR: "/healthz", Role.TRAINER: "/readyz", Role.ROLLOUT: "/readyz"}


def pod(job: Job, role: Role, index: int, status: GRPOJobStatus, settings: Settings) -> dict[str, Any]:
    """Manifest of the pod `<job>-<role>-<index>` for the attempt of `status`. Raises CannotBuild."""
    spec = spec_of(job)
    pod_volumes, mounts = volumes(job)
    metadata = object_meta(job, pod_name(job.name, role, index))
    metadata["labels"] |= {
        ROLE: role.value,
        INDEX: str(index),
        ATTEMPT: str(status.attempt or 0),
        CONFIG: config_hash(job),
    }
    metadata["annotations"] = {"kubectl.kubernetes.io/default-container": CONTAINER}
    if settings.scrape_annotations and _serves(role, index):
        port = next(iter(ports_of(job).of_pod(role, index).values()))
        scrape = {"scrape": "true", "port": str(port), "path": "/metrics"}
        metadata["annotations"] |= {f"prometheus.io/{key}": value for key, value in scrape.items()}
    manifest: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "restartPolicy": "Never",
            "hostname": member_name(role, index),
            "subdomain": service_name(job.name),
            "terminationGracePeriodSeconds": spec.runtime.termination_grace_period_seconds,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",  # a workspace of many checkpoints is not walked at each start
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **scheduling(job, role),
            **({"imagePullSecrets": pull_secrets} if (pull_secrets := _pull_secrets(job)) else {}),
            "containers": [_worker(job, role, index, status, settings, mounts)],
            "volumes": pod_volumes,
        },
    }
    manifest = patched(manifest, spec, role)
    keep_away(manifest["spec"], role, status)
    return manifest


def _worker(
    job: Job, role: Role, index: int, status: GRPOJobStatus, settings: Settings, mounts: list[dict[str, Any]]
) -> dict[str, Any]:
    spec = spec_of(job)
    runtime = spec.runtime
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": runtime.image or settings.worker_image,
        "imagePullPolicy": runtime.image_pull_policy if runtime.image else settings.worker_image_pull_policy,
        "command": ["grpo-worker", _command(spec, role), "--job", f"{DIRECTORY}/{FILE}"],
        "workingDir": WORKSPACE,
        "env": environment(job, role, index, status),
        "ports": [
            {"name": name, "containerPort": port, "protocol": "TCP"}
            for name, port in ports_of(job).of_pod(role, index).items()
        ],
        "resources": resources(spec, role),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": capabilities(spec, role),
        },
        "volumeMounts": mounts,
        "terminationMessagePath": TERMINATION_LOG_PATH,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if sources := environment_from(job):
        container["envFrom"] = sources
    if _serves(role, index):
        container["readinessProbe"] = {
            "httpGet": {"path": READINESS[role], "port": next(iter(ports_of(job).of_role(role)))},
            "periodSeconds": 5,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        }
    return container


def _serves(role: Role, index: int) -> bool:
    """Whether its first port answers probes and scrapers: of the trainers, rank 0 alone has a server."""
    return role is not Role.TRAINER or index == 0


def _command(spec: Spec, role: Role) -> str:
    """CUDA IPC needs the trainer's ranks and the engines of their devices in one PID namespace, so in one container."""
    return "node" if spec.colocated and role is Role.TRAINER else role.value


def _pull_secrets(job: Job) -> list[dict[str, str]]:
    return [{"name": name} for name in spec_of(job).runtime.image_pull_secrets]
