"""A tenant of the cluster: a namespace with a workspace on which the demo's model and data lie, and jobs that train there.

Invariant: what a test asserts it reads as a person would: the GRPOJob, its pods, and the files that the run left on its volume. Everything
goes through the API server, so an existing cluster serves as well as the project's own node.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from e2e.cluster.errors import ClusterError
from e2e.cluster.existing import ExistingCluster
from e2e.cluster.host import wait_until
from e2e.cluster.node import Node

from grpo_worker.config import parse_yaml

Cluster = Node | ExistingCluster

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "arithmetic.yaml"
PREPARE = REPOSITORY / "examples" / "cluster" / "prepare.yaml"
CLAIM = "grpo-workspace"
TOOLBOX = "toolbox"
START_SECONDS = (
    300  # from apply to the first step: images are there, vLLM on CPU takes half a minute, on a busy machine more
)
STEP_SECONDS = 60
# Of a job that must not end while something is done to it: on a quick machine the example's 80 steps take half a minute.
ENDLESS = {"totalEpochs": 1000, "testFreq": 0}
CHILDREN = "pods,services,configmaps,secrets,networkpolicies,poddisruptionbudgets"


@dataclass(frozen=True)
class Tenant:
    """A namespace and its workspace."""

    cluster: Cluster
    namespace: str
    worker_image: str

    def kubectl(self, *arguments: str, input_text: str | None = None, timeout_seconds: float = 60) -> str:
        return self.cluster.kubectl(
            "-n", self.namespace, *arguments, input_text=input_text, timeout_seconds=timeout_seconds
        )

    def get(self, *arguments: str) -> Any:
        return self.cluster.get("-n", self.namespace, *arguments)

    def prepare(self) -> None:
        """What examples/cluster/prepare.yaml says, and a pod that looks at the volume."""
        documents = list(yaml.safe_load_all(PREPARE.read_text()))
        claim, job = documents
        if isinstance(self.cluster, Node):
            self.cluster.create_volume(self.namespace, CLAIM)
        else:
            self._apply(claim)
        pod = job["spec"]["template"]["spec"]
        pod["containers"][0]["image"] = self.worker_image
        self._apply(job)
        toolbox = copy.deepcopy(pod)
        toolbox["containers"][0] |= {"command": ["sleep", "infinity"]}
        toolbox["containers"][0]["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
        toolbox["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        self._apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": TOOLBOX}, "spec": toolbox})
        self.kubectl("wait", "--for=condition=complete", "job/grpo-prepare", "--timeout=300s", timeout_seconds=310)
        self.kubectl("wait", "--for=condition=Ready", f"pod/{TOOLBOX}", "--timeout=120s", timeout_seconds=130)

    def shell(self, *command: str, timeout_seconds: float = 60) -> str:
        """Run a command on the workspace."""
        return self.kubectl("exec", TOOLBOX, "--", *command, timeout_seconds=timeout_seconds)

    def write(self, path: str, text: str) -> None:
        """A file on the workspace."""
        self.kubectl("exec", "-i", TOOLBOX, "--", "sh", "-c", f"cat > {path}", input_text=text)

    def submit(self, name: str, **changes: Any) -> "Job":
        """The demo's job under another name, with fields replaced: `submit("a", trainer={"totalSteps": 4})`."""
        document = parse_yaml(EXAMPLE.read_text(), EXAMPLE.name)  # 1e-4 is a number, as for kubectl
        document["metadata"]["name"] = name
        _merge(document["spec"], changes)
        self._apply(document)
        return Job(self, name)

    def _apply(self, document: dict[str, Any]) -> None:
        self.kubectl("apply", "--server-side", "-f", "-", input_text=json.dumps(document))


@dataclass(frozen=True)
class Job:
    """A GRPOJob on the cluster."""

    tenant: Tenant
    name: str

    @property
    def selector(self) -> str:
        return f"grpo.dev/job={self.name}"

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.tenant.get("grpojob", self.name).get("status", {})
        return status

    def step(self) -> int:
        return int(self.status().get("progress", {}).get("step") or 0)

    def condition(self, kind: str) -> dict[str, Any]:
        return next((item for item in self.status().get("conditions", []) if item["type"] == kind), {})

    def pods(self, role: str | None = None) -> dict[str, dict[str, Any]]:
        """Pods of the job by name."""
        selector = self.selector + (f",grpo.dev/role={role}" if role else "")
        return {pod["metadata"]["name"]: pod for pod in self.tenant.get("pods", "-l", selector)["items"]}

    def ready(self, role: str | None = None) -> int:
        """Pods that the kubelet calls ready; of a rollout pod, its own probe says that it serves current weights."""
        return sum(
            any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
            for pod in self.pods(role).values()
        )

    def uids(self, role: str) -> set[str]:
        return {pod["metadata"]["uid"] for pod in self.pods(role).values()}

    def children(self) -> list[str]:
        """Everything in the namespace that belongs to the job."""
        items = self.tenant.get(CHILDREN, "-l", self.selector)["items"]
        return [f"{item['kind']}/{item['metadata']['name']}" for item in items]

    def patch(self, spec: dict[str, Any]) -> None:
        self.tenant.kubectl("patch", "grpojob", self.name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def delete(self) -> None:
        """Delete it and wait until nothing of it is left but its files."""
        self.tenant.kubectl("delete", "grpojob", self.name, "--timeout=60s", timeout_seconds=70)
        wait_until(lambda: not self.children(), f"children of {self.name} gone", timeout_seconds=120)

    # waiting

    def until(self, holds: Callable[[dict[str, Any]], Any], what: str, timeout_seconds: float = START_SECONDS) -> None:
        """Wait for a status; a job that has failed meanwhile is told at once, with its pods' last words."""

        def check() -> bool:
            status = self.status()
            if holds(status):
                return True
            if status.get("state") == "Failed":
                raise ClusterError(
                    f"{self.name} failed while waiting for {what}: {status.get('message')}\n{self.logs()}"
                )
            return False

        def explain() -> str:
            return f"status: {json.dumps(self.status(), indent=1)[:4000]}\n{self.logs()}"

        wait_until(check, f"{self.name}: {what}", timeout_seconds=timeout_seconds, explain=explain)

    def until_state(self, state: str, timeout_seconds: float = START_SECONDS) -> None:
        self.until(lambda status: status.get("state") == state, f"state {state}", timeout_seconds)

    def until_step(self, step: int, timeout_seconds: float | None = None) -> None:
        limit = timeout_seconds or START_SECONDS + STEP_SECONDS * step
        self.until(lambda status: (status.get("progress", {}).get("step") or 0) >= step, f"step {step}", limit)

    def until_all_ready(self, timeout_seconds: float = START_SECONDS) -> None:
        self.until(
            lambda status: any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", [])),
            "all pods ready",
            timeout_seconds,
        )

    def logs(self) -> str:
        """The end of each pod's log."""
        parts = []
        for name in self.pods():
            try:
                parts.append(f"--- {name}\n{self.tenant.kubectl('logs', name, '--tail=15')}")
            except ClusterError as error:
                parts.append(f"--- {name}: {error}")
        return "\n".join(parts)

    # what the run left on the workspace

    def records(self, file: str) -> list[dict[str, Any]]:
        """A JSON-lines file of the run's directory."""
        return [json.loads(line) for line in self.tenant.shell("cat", f"runs/{self.name}/{file}").splitlines()]

    def trained(self) -> list[str]:
        """Prompt ids in the order in which steps trained on them."""
        return [uid for record in self.records("ledger.jsonl") for uid in record["trained"]]

    def metric(self, name: str) -> dict[int, float]:
        """A metric by step."""
        return {record["step"]: record[name] for record in self.records("metrics.jsonl") if name in record}


def _merge(target: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
