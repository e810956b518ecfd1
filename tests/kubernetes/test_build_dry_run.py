"""A real API server accepts what we build: no unknown field, every validation passed, and Pod Security `restricted` enforced."""

import json
from typing import Any

import pytest
from e2e.cluster import ClusterError, ControlPlane

from grpo_operator import build
from grpo_operator.control.read_job import read_job
from grpo_operator.facts import Job
from grpo_operator.labels import Role
from grpo_operator.settings import Settings
from grpo_worker.config.status import ExcludedNode, GRPOJobStatus

SETTINGS = Settings(worker_image="registry.example/grpo-worker:1", metrics_namespaces=("monitoring",))
STATUS = GRPOJobStatus(attempt=3, excluded_nodes=[ExcludedNode(name="node-a"), ExcludedNode(name="node-b")])
LEVELS = ("enforce", "warn")

WORKSPACE = {"claimName": "work", "subPath": "jobs/one"}
CPU: dict[str, Any] = {
    "runtime": {
        "device": "cpu",
        "workspace": WORKSPACE,
        "resources": {"trainer": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}}},
    },
    "rollout": {"replicas": 2},
}
EVERYTHING: dict[str, Any] = {
    "trainer": {"nodes": 4, "gpusPerNode": 8},
    "rollout": {"tensorParallelSize": 4, "replicas": 6, "maxReplicas": 8},
    "network": {"trainerPort": 9000, "socketInterface": "eth0"},
    "runtime": {
        "image": "registry.example/mine@sha256:" + "0" * 64,
        "imagePullPolicy": "Always",
        "imagePullSecrets": ["registry"],
        "workspace": WORKSPACE,
        "shmSize": "64Gi",
        "terminationGracePeriodSeconds": 900,
        "volumes": [
            {"name": "models", "claimName": "hub", "mountPath": "/models", "subPath": "qwen"},
            {"name": "cache", "claimName": "cache", "mountPath": "/cache", "readOnly": False},
        ],
        "resources": {"trainer": {"requests": {"cpu": 32}}, "coordinator": {"limits": {"cpu": 2, "memory": "8Gi"}}},
        "env": [
            {"name": "PLAIN", "value": "1"},
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
            {"name": "FLAG", "valueFrom": {"configMapKeyRef": {"name": "flags", "key": "x"}}},
        ],
        "envFrom": [{"secretRef": {"name": "all"}}, {"configMapRef": {"name": "flags"}}],
        "podTemplate": {
            "all": {"metadata": {"labels": {"team": "a"}, "annotations": {"sidecar.istio.io/inject": "false"}}},
            "trainer": {
                "spec": {
                    "containers": [
                        {"name": "worker", "env": [{"name": "MINE", "value": "1"}], "volumeMounts": [{"name": "tmp", "mountPath": "/scratch"}]}
                    ],
                    "topologySpreadConstraints": [
                        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {"matchLabels": {"team": "a"}}}
                    ],
                }
            },
        },
    },
    "scheduling": {
        "nodeSelector": {"pool": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, {"operator": "Exists"}],
        "priorityClassName": "training",
        "schedulerName": "other",
    },
}  # fmt: skip
COLOCATED = {
    "placement": "Colocated",
    "trainer": {"nodes": 2, "gpusPerNode": 8},
    "rollout": {"tensorParallelSize": 2},
    "runtime": {"workspace": WORKSPACE},
}
SAME_PORTS = {**CPU, "network": {"coordinatorPort": 7601, "rolloutPort": 7602}}  # of different pods
RDMA = {**EVERYTHING, "network": {"rdma": {"resource": "rdma/hca_shared", "count": 4}, "socketInterface": "eth0"}}


@pytest.fixture(scope="module")
def guarded(control_plane: ControlPlane) -> str:
    """A namespace that enforces the restricted Pod Security Standard, with what the jobs name."""
    name = control_plane.create_namespace("restricted")
    prepare(control_plane, name, "restricted")
    return name


def prepare(control_plane: ControlPlane, namespace: str, level: str) -> None:
    labels = [f"pod-security.kubernetes.io/{mode}={level}" for mode in LEVELS]
    control_plane.kubectl("label", "--overwrite", "namespace", namespace, *labels)
    priority = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "training"}}
    control_plane.apply({**priority, "value": 1000, "preemptionPolicy": "Never"})
    # A pod needs its service account, which a controller makes.
    control_plane.kubectl("wait", "--for=create", "serviceaccount/default", "-n", namespace, "--timeout=30s")


def job_of(namespace: str, spec: dict[str, Any]) -> Job:
    document = {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {"name": "a" * 40, "namespace": namespace, "uid": "0e6f6cc4-5bdc-4a1b-9f4a-4f3f7f3c8a11"},
        "spec": {
            "model": {"path": "demo/model"},
            "data": {"trainFiles": ["demo/train.parquet"]},
            "reward": {"function": "gsm8k"},
            **spec,
        },
    }
    job = read_job(document)
    assert not job.invalid, job.invalid
    return job


def manifests(job: Job) -> list[dict[str, Any]]:
    assert job.spec is not None
    pods = [build.pod(job, role, 0, STATUS, SETTINGS) for role in Role]
    pods += [build.pod(job, Role.ROLLOUT, 123, STATUS, SETTINGS), build.pod(job, Role.TRAINER, 1, STATUS, SETTINGS)]
    return build.shared(job, SETTINGS, "token") + pods


def dry_run(control_plane: ControlPlane, manifest: dict[str, Any], *how: str) -> str:
    text = json.dumps(manifest)
    return control_plane.kubectl(*how, "--dry-run=server", "--validate=strict", "-f", "-", input_text=text)


@pytest.mark.parametrize(
    "spec", [CPU, EVERYTHING, COLOCATED, SAME_PORTS], ids=["cpu", "everything", "colocated", "ports"]
)
def test_a_restricted_namespace_takes_everything_that_is_built(
    control_plane: ControlPlane, guarded: str, spec: dict[str, Any]
) -> None:
    for manifest in manifests(job_of(guarded, spec)):
        dry_run(control_plane, manifest, "create")


def test_shared_objects_can_be_applied_twice(control_plane: ControlPlane, guarded: str) -> None:
    job = job_of(guarded, EVERYTHING)
    for manifest in build.shared(job, SETTINGS, "token") * 2:
        text = json.dumps(manifest)
        control_plane.kubectl("apply", "--server-side", "--field-manager=grpo-operator", "-f", "-", input_text=text)


def test_rdma_needs_a_privileged_namespace(control_plane: ControlPlane, guarded: str, namespace: str) -> None:
    """IPC_LOCK is outside `restricted` and `baseline`; the coordinator, which has no device, is not."""
    prepare(control_plane, namespace, "privileged")
    for manifest in manifests(job_of(namespace, RDMA)):
        dry_run(control_plane, manifest, "create")
    coordinator, trainer = (build.pod(job_of(guarded, RDMA), role, 0, STATUS, SETTINGS) for role in list(Role)[:2])
    dry_run(control_plane, coordinator, "create")
    with pytest.raises(ClusterError, match="IPC_LOCK"):
        dry_run(control_plane, trainer, "create")


def test_labels_select_the_pods_of_one_job_alone(control_plane: ControlPlane, guarded: str) -> None:
    job = job_of(guarded, CPU)
    for role in Role:
        pod = build.pod(job, role, 0, STATUS, SETTINGS)
        del pod["metadata"][
            "ownerReferences"
        ]  # there is no such job: where the definition is known, the garbage collector would be quick
        control_plane.kubectl("create", "-f", "-", input_text=json.dumps(pod))
    found = control_plane.get("pods", "-n", guarded, "-l", f"grpo.dev/job-uid={job.uid},grpo.dev/role=trainer")
    assert [pod["metadata"]["name"] for pod in found["items"]] == [f"{job.name}-trainer-0"]
    control_plane.kubectl("delete", "pods", "--all", "-n", guarded, "--force", "--grace-period=0")
