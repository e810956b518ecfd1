"""The operator as a process of its own against a real API server, and a stand-in for the kubelet that only patches pod status."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from e2e.cluster import ControlPlane
from e2e.cluster.host import free_ports, wait_until

ROOT = Path(__file__).parents[2]
OPERATOR_NAMESPACE = "grpo-system"
KEY = b"0123456789abcdef0123456789abcdef"

Document = dict[str, Any]


def install(control_plane: ControlPlane) -> Path:
    """CRD and the chart's RBAC; a kubeconfig of the chart's ServiceAccount, so whatever the role lacks fails the tests."""
    control_plane.apply(ROOT / "crds" / "grpojobs.grpo.dev.yaml")
    wait_until(
        lambda: (
            '"Established"'
            in control_plane.kubectl("get", "crd", "grpojobs.grpo.dev", "-o", "jsonpath={.status.conditions}")
        ),
        "the CRD is served",
        timeout_seconds=60,
    )
    control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OPERATOR_NAMESPACE}})
    templates = [f"--show-only=templates/{name}.yaml" for name in ("serviceaccount", "rbac")]
    chart = str(ROOT / "charts" / "grpo-operator")
    control_plane.apply(
        control_plane.helm(
            "template", "grpo-operator", chart, "--kube-version=1.36.3", "--namespace", OPERATOR_NAMESPACE, *templates
        )
    )
    return control_plane.service_account_kubeconfig(OPERATOR_NAMESPACE, "grpo-operator")


class Operator:
    """`python -m grpo_operator` with short times."""

    def __init__(self, kubeconfig: Path, directory: Path, *arguments: str, name: str = "operator") -> None:
        self.kubeconfig, self.directory, self.name = kubeconfig, directory, name
        self.arguments = arguments
        self.log = directory / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Operator":
        (self.port,) = free_ports(1)
        key = self.directory / "token-key"
        key.write_bytes(KEY)
        command = [
            sys.executable, "-m", "grpo_operator", "--worker-image=registry.example/grpo-worker:1", f"--token-key-file={key}",
            f"--metrics-port={self.port}", f"--operator-namespace={OPERATOR_NAMESPACE}", "--poll-seconds=0.5", *self.arguments,
        ]  # fmt: skip
        environment = os.environ | {"KUBECONFIG": str(self.kubeconfig)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        return self

    def wait_ready(self, timeout_seconds: float = 60) -> "Operator":
        wait_until(
            lambda: self.http("/readyz")[0] == 200,
            "the operator is ready",
            timeout_seconds=timeout_seconds,
            explain=self.words,
        )
        return self

    def wait_leading(self, timeout_seconds: float = 60) -> "Operator":
        wait_until(
            lambda: self.metric("grpo_operator_leader") == 1,
            f"{self.name} leads",
            timeout_seconds=timeout_seconds,
            explain=self.words,
        )
        return self

    def http(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name whose labels include these; NaN when there is none."""
        values = [value for sample, tags, value in self.samples() if sample == name and labels.items() <= tags.items()]
        return sum(values) if values else float("nan")

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        for line in self.http("/metrics")[1].splitlines():
            found = re.fullmatch(r"([a-z_]+)(?:\{(.*)\})? (\S+)", line)
            if found:
                yield found[1], dict(re.findall(r'(\w+)="([^"]*)"', found[2] or "")), float(found[3])

    def resident_mebibytes(self) -> float:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def signal(self, number: int) -> int:
        """Exit code after that signal."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(40)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(9)

    def words(self) -> str:
        return self.log.read_text()[-4000:]


class Cluster:
    """Jobs and pods of one namespace, as kubectl and a kubelet would treat them."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.control_plane, self.namespace = control_plane, namespace

    # ---- people

    def submit(self, name: str = "demo", **spec: Any) -> Document:
        base: Document = {
            "model": {"path": "demo/model"},
            "data": {"trainFiles": ["demo/train.parquet"], "trainBatchSize": 16},
            "reward": {"function": "gsm8k"},
            "actor": {"ppoMiniBatchSize": 16},
            "rollout": {"n": 4, "replicas": 2},
            "runtime": {"device": "cpu", "workspace": {"claimName": "work"}},
        }
        for section, fields in spec.items():
            base[section] = base.get(section, {}) | fields if isinstance(fields, dict) else fields
        metadata = {"name": name, "namespace": self.namespace}
        self.control_plane.apply(
            {"apiVersion": "grpo.dev/v1alpha1", "kind": "GRPOJob", "metadata": metadata, "spec": base}
        )
        return self.job(name)

    def patch(self, name: str, spec: Document) -> None:
        self.kubectl("patch", "grpojob", name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def kubectl(self, *arguments: str) -> str:
        return self.control_plane.kubectl("-n", self.namespace, *arguments)

    # ---- looks

    def job(self, name: str = "demo") -> Document:
        return self.control_plane.get("grpojob", name, "-n", self.namespace)

    def status(self, name: str = "demo") -> Document:
        return self.job(name).get("status", {})

    def pods(self, job: str = "demo") -> dict[str, Document]:
        """By name without the job's."""
        items = self.control_plane.get("pods", "-n", self.namespace, "-l", f"grpo.dev/job={job}")["items"]
        return {item["metadata"]["name"].removeprefix(f"{job}-"): item for item in items}

    def uids(self, job: str = "demo") -> dict[str, str]:
        return {name: pod["metadata"]["uid"] for name, pod in self.pods(job).items()}

    def condition(self, kind: str, job: str = "demo") -> Document:
        return next((item for item in self.status(job).get("conditions", ()) if item["type"] == kind), {})

    def children(self) -> list[str]:
        kinds = "pods,services,configmaps,secrets,networkpolicies,poddisruptionbudgets"
        items = self.control_plane.get(kinds, "-n", self.namespace, "-l", "app.kubernetes.io/managed-by=grpo-operator")[
            "items"
        ]
        return sorted(f"{item['kind']}/{item['metadata']['name']}" for item in items)

    # ---- the kubelet's part

    def run_pod(self, pod: Document, ready: bool = True, ip: str = "127.0.0.1") -> None:
        """Its container starts."""
        state = {"running": {"startedAt": _now()}}
        self._patch(pod, "Running", state, ready, ip)

    def end_pod(self, pod: Document, exit_code: int, said: str = "", conditions: tuple[Document, ...] = ()) -> None:
        """Its container ends."""
        terminated = {"exitCode": exit_code, "reason": "Completed" if exit_code == 0 else "Error", "message": said}
        terminated |= {"startedAt": _now(), "finishedAt": _now()}
        phase = "Succeeded" if exit_code == 0 else "Failed"
        self._patch(pod, phase, {"terminated": terminated}, False, "", conditions)

    def run_all(self, job: str = "demo", count: int = 4) -> None:
        """Once there are `count` pods, all of them run."""
        wait_until(
            lambda: len(self.pods(job)) == count,
            f"{job} has {count} pods",
            timeout_seconds=30,
            explain=lambda: str(self.status(job)),
        )
        for pod in self.pods(job).values():
            if pod["status"]["phase"] == "Pending":
                self.run_pod(pod)

    def _patch(
        self, pod: Document, phase: str, state: Document, ready: bool, ip: str, conditions: tuple[Document, ...] = ()
    ) -> None:
        truth = "True" if ready else "False"
        status: Document = {
            "phase": phase,
            "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": truth}, *conditions],
            "containerStatuses": [
                {
                    "name": "worker", "image": "x", "imageID": "x", "ready": ready, "restartCount": 0,
                    "started": "running" in state, "state": state,
                }
            ],
        }  # fmt: skip
        if ip:
            status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
        arguments = ["--subresource=status", "--type=merge", "-p", json.dumps({"status": status})]
        self.kubectl("patch", "pod", pod["metadata"]["name"], *arguments)

    # ---- waiting

    def wait(self, what: str, holds: Callable[[], bool], job: str = "demo", timeout_seconds: float = 30) -> None:
        def explain() -> str:
            return f"{json.dumps(self.status(job), indent=1)}\n{list(self.pods(job))}"

        wait_until(holds, what, timeout_seconds=timeout_seconds, explain=explain)


class FakeCoordinator:
    """`GET /status` and `POST /v1/stop` as a coordinator answers them, at 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.document: Document = {}
        self.tokens: set[str] = set()
        self.stops = 0

    @contextmanager
    def serving(self) -> Iterator["FakeCoordinator"]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.tokens.add(self.headers.get("Authorization", ""))
                self._answer(outer.document)

            def do_POST(self) -> None:
                outer.tokens.add(self.headers.get("Authorization", ""))
                outer.stops += self.path == "/v1/stop"
                self._answer({"stopping": True})

            def _answer(self, document: Document) -> None:
                body = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join(5)

    def trains(self, step: int, **more: Any) -> None:
        """It has finished that many steps."""
        self.document = {
            "name": "demo", "state": "Training", "message": "", "step": step, "total_steps": 40, "epoch": step / 40, "total_epochs": 1,
            "policy_version": step, "reward": 0.5, "accuracy": None, "train_accuracy": 0.5, "response_length": 10.0, "kl": 0.0,
            "tokens_per_second": 100.0, "timing_seconds": {}, "staleness": {"mean": 0.0, "max": 0}, "checkpoint": None,
            "members": [
                {"role": "rollout", "name": f"rollout-{n}", "state": "ready", "in_service": True, "weight_version": step, "url": "", "stats": {}}
                for n in range(2)
            ],
            "eta_seconds": 10.0, "started_time": time.time() - 10, "last_progress_time": time.time(), "incarnation": "i",
        } | more  # fmt: skip


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
