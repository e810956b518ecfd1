"""What plays the cluster around the operators: fake nodes with GPUs, the scheduler, kwok as every kubelet, and the coordinators of all jobs.

Invariant: nothing here knows which operator made a pod; both get the same nodes and the same stages.
"""

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from aiohttp import web
from e2e.cluster import ControlPlane
from e2e.cluster.control_plane import scheduler_command
from e2e.cluster.host import wait_until

NODES = 100
GPUS_PER_NODE = 512
GPU = "nvidia.com/gpu"
NAMESPACE = "jobs"
CLAIM = "work"
UNLIMITED = 5000  # requests a second of scheduler's and kwok's part: they are not what is measured
STEP_SECONDS = 60.0  # of each job while it trains
TOTAL_STEPS = 1000

READY = """\
{{ $now := Now }}
phase: Running
startTime: {{ $now | Quote }}
hostIP: 127.0.0.1
podIP: 127.0.0.1
podIPs:
- ip: 127.0.0.1
conditions:
{{ range list "PodScheduled" "Initialized" "ContainersReady" "Ready" }}
- type: {{ . }}
  status: "True"
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  ready: true
  started: true
  restartCount: 0
  state:
    running:
      startedAt: {{ $now | Quote }}
{{ end }}
"""


def configuration() -> list[dict[str, Any]]:
    """kwok's: pods start at once. None of them ends a pod: kwok deletes by name, and so a successor too that has been made meanwhile."""
    deleted, phase = ".metadata.deletionTimestamp", ".status.phase"
    ready = '.status.conditions.[] | select( .type == "Ready" ) | .status'
    pending = [
        {"key": deleted, "operator": "DoesNotExist"},
        {"key": phase, "operator": "In", "values": ["Pending"]},
        {"key": ready, "operator": "NotIn", "values": ["True"]},
    ]
    return [
        {
            "apiVersion": "config.kwok.x-k8s.io/v1alpha1",
            "kind": "KwokConfiguration",
            "options": {
                "manageAllNodes": True,
                "enableDebuggingHandlers": False,
                "podPlayStageParallelism": 16,
                "nodePlayStageParallelism": 1,
                "podsOnNodeSyncParallelism": 1,
                "enablePodsOnNodeSyncListPager": True,
            },
        },
        _stage("Pod", "start", pending, {"statusTemplate": READY}),
        # kwok plays pods only on nodes that some stage is about. This one never comes to pass: all nodes are ready.
        _stage("Node", "start-node", [{"key": ready, "operator": "NotIn", "values": ["True"]}], {"statusTemplate": ""}),
    ]


def _stage(kind: str, name: str, matches: list[Any], following: dict[str, Any]) -> dict[str, Any]:
    selector = {"matchExpressions": matches}
    spec = {"resourceRef": {"apiGroup": "v1", "kind": kind}, "selector": selector, "next": following}
    return {"apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": {"name": name}, "spec": spec}


def node(number: int) -> dict[str, Any]:
    size = {"cpu": "10000", "memory": "100Ti", "pods": "1000", "ephemeral-storage": "100Ti", GPU: str(GPUS_PER_NODE)}
    name = f"node-{number:03d}"
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}},
        "status": {
            "allocatable": size,
            "capacity": size,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True", "reason": "Kwok"}],
        },
    }


def workspace() -> list[dict[str, Any]]:
    """A volume that is bound already, as a controller would leave it."""
    size, modes = {"storage": "1Ti"}, ["ReadWriteMany"]
    common = {"accessModes": modes, "storageClassName": "shared"}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": CLAIM},
            "spec": common
            | {
                "capacity": size,
                "nfs": {"server": "127.0.0.1", "path": "/"},
                "claimRef": {"namespace": NAMESPACE, "name": CLAIM},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {
                "name": CLAIM,
                "namespace": NAMESPACE,
                "annotations": {"pv.kubernetes.io/bind-completed": "yes"},
            },
            "spec": common | {"resources": {"requests": size}, "volumeName": CLAIM},
        },
    ]


def _text(documents: list[dict[str, Any]]) -> str:
    return "\n---\n".join(json.dumps(item) for item in documents)


def dies_with_us(command: list[str]) -> list[str]:
    """The command, to be killed by the kernel when this process is."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *command]


class Background:
    """A process of the benchmark's own; its words go to a log."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                dies_with_us(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment
            )

    def end(self, number: int = signal.SIGTERM, limit_seconds: float = 40.0) -> None:
        """Signal it and wait for its end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(limit_seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(limit_seconds)

    def check(self) -> None:
        """Raises RuntimeError with its last words when it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(
                f"{self.log.name} ended with {self.process.returncode}:\n{self.log.read_text(errors='replace')[-3000:]}"
            )

    # ---- what the kernel says of it

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.process.pid)

    def memory_mib(self, field: str = "VmRSS") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Stage:
    """Scheduler and kwok, while the `with` block lasts."""

    def __init__(self, plane: ControlPlane, kwok: Path, logs: Path) -> None:
        self._plane, self._kwok, self._logs = plane, kwok, logs
        self._running: list[Background] = []

    def __enter__(self) -> Self:
        plane = self._plane
        plane.kubectl("create", "namespace", NAMESPACE)
        nodes = [node(number) for number in range(NODES)]
        plane.apply(_text([*nodes, *workspace()]))
        # The API takes the status from a request of its own only.
        plane.kubectl("apply", "--server-side", "--subresource=status", "-f", "-", input_text=_text(nodes))
        # Admission marks a new node as not ready; the controller that would take the mark away does not run here.
        plane.kubectl("taint", "nodes", "--all", "node.kubernetes.io/not-ready-", timeout_seconds=120)
        self._bind()
        config = self._logs / "kwok.yaml"
        config.write_text(yaml.safe_dump_all(configuration()))
        user = plane.user_kubeconfig("kwok", ["system:masters"])
        self._start("kwok", [str(self._kwok), f"--kubeconfig={user}", f"--config={config}"])
        user = plane.user_kubeconfig("system:kube-scheduler")
        command = [str(word) for word in scheduler_command(plane.binaries, user)]
        limits = [f"--kube-api-qps={UNLIMITED}", f"--kube-api-burst={UNLIMITED}"]
        self._start("scheduler", [*command, "--secure-port=0", *limits])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in reversed(self._running):
            each.end(signal.SIGKILL)

    def check(self) -> None:
        for each in self._running:
            each.check()

    def _start(self, name: str, command: list[str]) -> None:
        self._running.append(Background(command, self._logs / f"{name}.log"))

    def _bind(self) -> None:
        for kind, scope in (("pv", []), ("pvc", ["--namespace", NAMESPACE])):
            patch = json.dumps({"status": {"phase": "Bound"}})
            self._plane.kubectl("patch", kind, CLAIM, *scope, "--subresource=status", "--type=merge", "-p", patch)
        wait_until(
            lambda: '"Bound"' in json.dumps(self._plane.get("pvc", CLAIM, "--namespace", NAMESPACE)["status"]),
            "the workspace is bound",
            timeout_seconds=20,
        )


class Coordinators:
    """`GET /status` as the coordinators of all jobs would answer it: one server on loopback, which knows a job by its token.

    Until `training` is set no job has a step; from then on each finishes one every STEP_SECONDS, spread over time.
    """

    def __init__(self, port: int, rollouts: int) -> None:
        self.port, self._rollouts = port, rollouts
        self._since: float | None = None
        self.polls = 0

    def train(self) -> None:
        self._since = time.time()

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.add_routes([web.get("/status", self._status), web.post("/v1/stop", self._stop)])
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _stop(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _status(self, request: web.Request) -> web.Response:
        self.polls += 1
        return web.json_response(self.document(request.headers.get("Authorization", ""), time.time()))

    def document(self, token: str, now: float) -> dict[str, Any]:
        """The status of the job with this token."""
        step = 0
        if self._since is not None:
            offset = hashlib.sha256(token.encode()).digest()[0] / 256 * STEP_SECONDS
            step = int((now - self._since + offset) / STEP_SECONDS)
        progressed = now if self._since is None else self._since
        return {
            "name": "",
            "state": "Training" if self._since is not None else "Starting",
            "message": "",
            "step": step,
            "total_steps": TOTAL_STEPS,
            "epoch": step / 100,
            "total_epochs": TOTAL_STEPS / 100,
            "policy_version": step,
            "reward": 0.5,
            "accuracy": None,
            "train_accuracy": 0.5,
            "response_length": 100.0,
            "kl": 0.0,
            "tokens_per_second": 1000.0,
            "timing_seconds": {"gen": 40.0, "update_actor": 15.0, "update_weights": 1.0, "step": STEP_SECONDS},
            "staleness": {"mean": 0.0, "max": 0},
            "checkpoint": None,
            "members": [
                {
                    "role": "rollout", "name": f"rollout-{index}", "state": "ready", "in_service": True,
                    "weight_version": step, "url": "", "stats": {},
                }
                for index in range(self._rollouts)
            ],
            "eta_seconds": (TOTAL_STEPS - step) * STEP_SECONDS,
            "started_time": progressed,
            "last_progress_time": progressed + step * STEP_SECONDS,
            "incarnation": "1",
        }  # fmt: skip
