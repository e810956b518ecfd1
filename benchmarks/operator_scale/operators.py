"""The two operators: how each is installed, started and used, and what its jobs' status says.

Invariant: both run as processes of this machine with a service account of their own and the settings they have without flags. A job is
16 pods of 8 GPUs in both.
"""

import os
import signal
import sys
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from e2e.cluster import ControlPlane
from e2e.cluster.certificates import Authority
from e2e.cluster.errors import ClusterError
from e2e.cluster.host import free_ports, wait_until

from benchmarks.operator_scale import peer
from benchmarks.operator_scale.stage import CLAIM, GPU, NAMESPACE, Background

ROOT = Path(__file__).parents[2]
TRAINERS, ROLLOUTS = 7, 8
PODS_PER_JOB = 1 + TRAINERS + ROLLOUTS
GPUS_PER_POD = 8

Document = dict[str, Any]


class Operator(ABC):
    """One operator on one API server."""

    name: str
    collection: str  # of its jobs
    namespace: str
    account: str

    def __init__(self, plane: ControlPlane, logs: Path) -> None:
        self.plane, self.logs = plane, logs
        self.running: Background | None = None
        self.spent_cpu_seconds = 0.0
        self.peak_rss_mib = 0.0

    @property
    def user(self) -> str:
        """As the audit log names it."""
        return f"system:serviceaccount:{self.namespace}:{self.account}"

    @abstractmethod
    def install(self) -> None:
        """CRD, namespace, service account and rights."""

    @abstractmethod
    def command(self) -> list[str]:
        """With free ports; each start asks anew."""

    @abstractmethod
    def ready_url(self) -> str:
        """Answers 200 once it is ready."""

    @abstractmethod
    def job(self, name: str) -> Document:
        """16 pods."""

    @abstractmethod
    def shown(self, status: Document) -> int:
        """Pods at work by the status of a job."""

    @abstractmethod
    def replaceable(self, job: str) -> list[str]:
        """Names of eight pods of the job that are made anew alone, and that are counted in the status."""

    @abstractmethod
    def at_work(self, works: bool) -> Document:
        """Status of a pod that it counts, or that it no longer counts."""

    # ---- the process

    def start(self) -> None:
        environment = os.environ | {"KUBECONFIG": str(self.kubeconfig)} | self.environment()
        self.running = Background(self.command(), self.logs / f"{self.name}.log", environment)

    def environment(self) -> dict[str, str]:
        return {}

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, and keep what it used."""
        if self.running is not None:
            if self.running.process.poll() is None:
                self.spent_cpu_seconds += self.running.cpu_seconds()
                self.peak_rss_mib = max(self.peak_rss_mib, self.running.memory_mib("VmHWM"))
            self.running.end(number)
            self.running = None

    def is_ready(self) -> bool:
        assert self.running is not None
        self.running.check()
        try:
            with urllib.request.urlopen(self.ready_url(), timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        return self.spent_cpu_seconds + (self.running.cpu_seconds() if self.running is not None else 0.0)

    def wait_served(self) -> None:
        """Until the API server answers for its jobs."""

        def served() -> bool:
            try:
                self.plane.kubectl("get", "--raw", self.collection)
            except ClusterError:
                return False
            return True

        wait_until(served, f"{self.collection} is served", timeout_seconds=30)

    def prepare_account(self) -> None:
        self.kubeconfig = self.plane.service_account_kubeconfig(self.namespace, self.account)


class Ours(Operator):
    name, collection = "grpo-operator", f"/apis/grpo.dev/v1alpha1/namespaces/{NAMESPACE}/grpojobs"
    namespace, account = "grpo-system", "grpo-operator"

    def __init__(self, plane: ControlPlane, logs: Path, coordinator_port: int, profile: Path | None = None) -> None:
        super().__init__(plane, logs)
        self._coordinator_port, self._profile = coordinator_port, profile
        self._port = 0

    def install(self) -> None:
        self.plane.apply(ROOT / "crds" / "grpojobs.grpo.dev.yaml")
        self.wait_served()
        self.plane.kubectl("create", "namespace", self.namespace)
        templates = [f"--show-only=templates/{name}.yaml" for name in ("serviceaccount", "rbac")]
        chart = ["template", self.account, str(ROOT / "charts" / "grpo-operator"), "--kube-version=1.36.3"]
        self.plane.apply(self.plane.helm(*chart, "--namespace", self.namespace, *templates))
        self.prepare_account()

    def command(self) -> list[str]:
        (self._port,) = free_ports(1)
        key = self.logs / "token-key"
        key.write_bytes(b"0123456789abcdef0123456789abcdef")
        profiler = [] if self._profile is None else ["-m", "cProfile", "-o", str(self._profile)]
        flags = [
            "--worker-image=registry.example/grpo-worker:1",
            f"--token-key-file={key}",
            f"--metrics-port={self._port}",
        ]
        return [sys.executable, *profiler, "-m", "grpo_operator", *flags]

    def ready_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/readyz"

    def job(self, name: str) -> Document:
        batch = TRAINERS * GPUS_PER_POD * 8
        spec: Document = {
            "model": {"path": "demo/model"},
            "data": {"trainFiles": ["demo/train.parquet"], "trainBatchSize": batch},
            "reward": {"function": "gsm8k"},
            "actor": {"ppoMiniBatchSize": batch},
            "trainer": {"nodes": TRAINERS, "gpusPerNode": GPUS_PER_POD},
            "rollout": {"n": 8, "replicas": ROLLOUTS, "tensorParallelSize": GPUS_PER_POD},
            "network": {"coordinatorPort": self._coordinator_port},
            "runtime": {"device": "cuda", "workspace": {"claimName": CLAIM}},
        }
        return {"apiVersion": "grpo.dev/v1alpha1", "kind": "GRPOJob", "metadata": {"name": name}, "spec": spec}

    def shown(self, status: Document) -> int:
        return sum(role.get("ready") or 0 for role in status.get("roles") or ())

    def replaceable(self, job: str) -> list[str]:
        return [f"{job}-rollout-{index}" for index in range(ROLLOUTS)]

    def at_work(self, works: bool) -> Document:
        return {"conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": str(works)}]}


class TrainingOperator(Operator):
    """Kubeflow's, with PyTorchJobs: a master and 15 workers, counted by phase."""

    name, collection = "training-operator", f"/apis/kubeflow.org/v1/namespaces/{NAMESPACE}/pytorchjobs"
    namespace, account = "kubeflow", "training-operator"

    def __init__(self, plane: ControlPlane, logs: Path) -> None:
        super().__init__(plane, logs)
        self._probe_port = 0

    def install(self) -> None:
        self.plane.apply(peer.source() / "manifests" / "base" / "crds" / "kubeflow.org_pytorchjobs.yaml")
        self.wait_served()
        self.plane.kubectl("create", "namespace", self.namespace)
        self.plane.kubectl("create", "serviceaccount", self.account, "-n", self.namespace)
        subject = f"--serviceaccount={self.namespace}:{self.account}"
        self.plane.kubectl("create", "clusterrolebinding", self.account, "--clusterrole=cluster-admin", subject)
        # It fills this in itself. The files are what a kubelet would mount; nobody calls its webhook here, so any pair will do.
        self.plane.kubectl("create", "secret", "generic", peer.WEBHOOK_SECRET, "-n", self.namespace)
        certificate, key = Authority(self.logs / "webhook").issue("webhook", user="webhook")
        peer.mount(certificate, key)
        self.prepare_account()

    def command(self) -> list[str]:
        metrics, self._probe_port, webhook = free_ports(3)
        addresses = [
            f"--metrics-bind-address=127.0.0.1:{metrics}",
            f"--health-probe-bind-address=127.0.0.1:{self._probe_port}",
        ]
        return [str(peer.build()), "--enable-scheme=pytorchjob", f"--webhook-server-port={webhook}", *addresses]

    def environment(self) -> dict[str, str]:
        return {"MY_POD_NAMESPACE": self.namespace, "TMPDIR": "/tmp"}

    def ready_url(self) -> str:
        return f"http://127.0.0.1:{self._probe_port}/readyz"

    def job(self, name: str) -> Document:
        resources = {"limits": {GPU: str(GPUS_PER_POD)}}
        volume = {"name": "workspace", "persistentVolumeClaim": {"claimName": CLAIM}}
        container = {
            "name": "pytorch",
            "image": "registry.example/worker:1",
            "resources": resources,
            "volumeMounts": [{"name": "workspace", "mountPath": "/workspace"}],
        }
        template = {"spec": {"containers": [container], "volumes": [volume]}}
        replicas = {
            role: {"replicas": number, "restartPolicy": "OnFailure", "template": template}
            for role, number in (("Master", 1), ("Worker", PODS_PER_JOB - 1))
        }
        spec = {"pytorchReplicaSpecs": replicas}
        return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": name}, "spec": spec}

    def shown(self, status: Document) -> int:
        return sum(replica.get("active") or 0 for replica in (status.get("replicaStatuses") or {}).values())

    def replaceable(self, job: str) -> list[str]:
        return [f"{job}-worker-{index}" for index in range(ROLLOUTS)]

    def at_work(self, works: bool) -> Document:
        return {"phase": "Running" if works else "Unknown"}
