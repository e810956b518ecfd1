"""`grpo submit`, `status`, `logs`, `stop` and `resume` against a real API server; the tests play the operator and the kubelet."""

import http.server
import json
import re
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from e2e.cluster import ControlPlane

from grpo_operator import labels
from grpo_operator.cli import add_commands, follow, logs, suspend
from grpo_worker.cli import main
from grpo_worker.config.crd import crd, crd_yaml

JOB = """
apiVersion: grpo.dev/v1alpha1
kind: GRPOJob
metadata: {name: small}
spec:
  model: {path: demo/model}
  data: {trainFiles: [demo/train.parquet]}
  reward: {function: gsm8k}
  trainer: {totalEpochs: 2}
  runtime: {device: cpu, workspace: {claimName: shared}}
"""
CONDITIONS = (
    "Scheduled",
    "Ready",
    "Progressing",
    "CheckpointCurrent",
    "Restarting",
    "Suspended",
    "Succeeded",
    "Failed",
)
PLURAL = "grpojobs.grpo.dev"


@pytest.fixture(scope="session", autouse=True)
def _definition(control_plane: ControlPlane) -> None:
    control_plane.apply(crd_yaml())
    control_plane.wait_for_crd(crd()["metadata"]["name"])


class Grpo:
    """The `grpo` command in a namespace, and what the operator would write."""

    def __init__(self, control_plane: ControlPlane, namespace: str, file: Path) -> None:
        self.control_plane = control_plane
        self.namespace = namespace
        self.file = str(file)
        self.kubeconfig = str(control_plane.kubeconfig)

    def __call__(self, *arguments: str, kubeconfig: str | None = None) -> int:
        return main.call([*arguments, "-n", self.namespace, "--kubeconfig", kubeconfig or self.kubeconfig])

    def submit(self, *arguments: str) -> int:
        return self("submit", self.file, *arguments)

    def in_background(self, *arguments: str) -> Callable[[], int]:
        """Begin a command; the returned function waits for its exit code."""
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(self(*arguments)), daemon=True)
        thread.start()

        def wait() -> int:
            thread.join(30)
            assert codes, f"{arguments} did not end"
            return codes[0]

        return wait

    def job(self) -> dict[str, Any]:
        return dict(self.control_plane.get(PLURAL, "small", "-n", self.namespace))

    def write_status(self, conditions: Mapping[str, tuple[str, str, str]] | None = None, **status: Any) -> None:
        """Patch the status as the operator would. `conditions`: type -> (status, reason, message)."""
        known = dict.fromkeys(CONDITIONS, ("False", "AsTold", "")) | dict(conditions or {})
        status["conditions"] = [
            {
                "type": kind, "status": value, "reason": reason, "message": message,
                "lastTransitionTime": "2026-09-21T14:13:20Z", "observedGeneration": 1,
            }
            for kind, (value, reason, message) in known.items()
        ]  # fmt: skip
        self.patch(PLURAL, "small", {"status": status}, "--subresource=status")

    def patch(self, kind: str, name: str, patch: Mapping[str, Any], *options: str) -> None:
        self.control_plane.kubectl(
            "patch", kind, name, "-n", self.namespace, "--type=merge", "-p", json.dumps(patch), *options
        )


@pytest.fixture
def grpo(control_plane: ControlPlane, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grpo:
    monkeypatch.setattr(main, "entry_points", lambda group: [SimpleNamespace(load=lambda: add_commands)])
    monkeypatch.chdir(tmp_path)
    for module in (follow, suspend, logs):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.1)
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    return Grpo(control_plane, namespace, file)


class Printed:
    """What a command has printed so far, while it runs."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.text = ""

    def all(self) -> str:
        out, err = self._capsys.readouterr()
        self.text += out + err
        return self.text

    def out(self) -> str:
        """What came to stdout since the last look."""
        out, err = self._capsys.readouterr()
        self.text += out + err
        return str(out)

    def wait_for(self, words: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.all():
            assert time.monotonic() < deadline, f"{words!r} was not printed: {self.text}"
            time.sleep(0.05)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    return Printed(capsys)


def test_a_job_is_created_changed_and_left_alone(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    printed.wait_for(f"small in namespace {grpo.namespace}: created")
    assert f"grpo status small --follow -n {grpo.namespace} --kubeconfig" in printed.text
    assert f"there is no PersistentVolumeClaim shared in namespace {grpo.namespace}" in printed.text
    assert grpo.submit("--no-follow") == 0
    printed.wait_for("small in namespace " + grpo.namespace + ": unchanged")
    assert grpo.submit("--no-follow", "--set", "activeDeadlineSeconds=100") == 0
    printed.wait_for(": changed")
    assert grpo.job()["spec"]["activeDeadlineSeconds"] == 100


def test_an_object_that_kubectl_applied_is_the_same_to_grpo(grpo: Grpo, printed: Printed) -> None:
    grpo.control_plane.kubectl("apply", "-n", grpo.namespace, "-f", grpo.file)
    assert grpo.submit("--no-follow") == 0
    printed.wait_for(": unchanged")


def test_a_dry_run_is_judged_by_the_api_server_and_stores_nothing(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--dry-run") == 0
    printed.wait_for("would be created; nothing was stored")
    assert grpo.control_plane.get(PLURAL, "-n", grpo.namespace)["items"] == []


def test_an_immutable_field_is_named_with_what_to_do(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    assert grpo.submit("--no-follow", "--set", "model.path=other/model") == 64
    printed.wait_for("spec.model.path")
    assert "immutable" in printed.text and "Traceback" not in printed.text
    assert grpo.job()["spec"]["model"]["path"] == "demo/model"


def test_a_scale_by_somebody_else_is_not_undone_unless_told(grpo: Grpo, printed: Printed) -> None:
    replicas = ("--no-follow", "--set", "rollout.replicas=2")
    assert grpo.submit(*replicas) == 0
    grpo.patch(PLURAL, "small", {"spec": {"rollout": {"replicas": 3}}}, "--field-manager=kubectl-scale")
    assert grpo.submit(*replicas) == 64
    printed.wait_for("spec.rollout.replicas: conflict with")
    assert "--force-conflicts" in printed.text
    assert grpo.submit(*replicas, "--force-conflicts") == 0
    assert grpo.job()["spec"]["rollout"]["replicas"] == 2


def test_an_ended_job_is_not_submitted_again(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    grpo.write_status({"Succeeded": ("True", "Done", "")}, state="Succeeded")
    assert grpo.submit("--no-follow") == 64
    printed.wait_for(f"kubectl delete grpojob small -n {grpo.namespace}")
    assert "--set metadata.name=NAME" in printed.text


def test_following_shows_events_and_steps_and_ends_with_0_when_the_job_succeeds(grpo: Grpo, printed: Printed) -> None:
    wait = grpo.in_background("submit", grpo.file)
    printed.wait_for(": created")
    uid = grpo.job()["metadata"]["uid"]
    grpo.control_plane.apply(
        {
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": "small.1", "namespace": grpo.namespace},
            "involvedObject": {"kind": "GRPOJob", "name": "small", "namespace": grpo.namespace, "uid": uid},
            "type": "Warning", "reason": "RolloutReplaced", "message": "small-rollout-0 is made again",
            "firstTimestamp": "2026-09-21T14:13:20Z", "lastTimestamp": "2026-09-21T14:13:20Z", "count": 1,
        }
    )  # fmt: skip
    printed.wait_for("warning: small-rollout-0 is made again")
    for step in (1, 2):
        grpo.write_status(state="Training", progress={"step": step, "totalSteps": 2, "reward": 0.5, "epoch": 1.0})
        printed.wait_for(f"step {step}/2  epoch 1.00  reward 0.500")
    grpo.write_status({"Succeeded": ("True", "Done", "2 steps; checkpoint epoch_1_step_2")}, state="Succeeded")
    assert wait() == 0
    assert "small succeeded. 2 steps; checkpoint epoch_1_step_2" in printed.all()
    assert printed.text.count("small-rollout-0 is made again") == 1


@pytest.mark.parametrize(
    ("reason", "exit_code", "expected"),
    [("InvalidData", 65, 65), ("OutOfMemory", 1, 84), ("NCCLTimeout", 85, 85), ("NCCLTimeout", 137, 70)],
)
def test_following_ends_with_the_code_of_the_failure(
    grpo: Grpo, printed: Printed, reason: str, exit_code: int, expected: int
) -> None:
    assert grpo.submit("--no-follow") == 0
    wait = grpo.in_background("status", "small", "--follow")
    failure = {"pod": "small-trainer-0", "role": "trainer", "exitCode": exit_code, "reason": "X", "message": "words"}
    grpo.write_status({"Failed": ("True", reason, "what went wrong")}, state="Failed", failures=[failure])
    assert wait() == expected
    assert f"grpo: small failed: {reason}: what went wrong" in printed.all()


def test_following_ends_with_80_when_somebody_suspends_the_job(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    wait = grpo.in_background("status", "small", "--watch")
    assert grpo("stop", "small", "--no-wait") == 0
    grpo.write_status({"Suspended": ("True", "Suspended", "")}, state="Suspended")
    assert wait() == 80
    assert f"grpo resume small -n {grpo.namespace}" in printed.all()


def test_a_job_that_is_deleted_ends_the_following(grpo: Grpo, printed: Printed) -> None:
    wait = grpo.in_background("submit", grpo.file)
    printed.wait_for(": created")
    grpo.control_plane.kubectl("delete", PLURAL, "small", "-n", grpo.namespace)
    assert wait() == 70
    assert "small was deleted" in printed.all()


def test_ctrl_c_leaves_the_job_running(grpo: Grpo, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=interrupt, time=time.time, monotonic=time.monotonic))
    assert grpo.submit() == 130
    assert f"small goes on without you. Look again: grpo status small --follow -n {grpo.namespace}" in printed.all()
    assert grpo.job()["spec"].get("suspend", False) is False


def test_stop_waits_until_the_job_is_suspended_and_resume_lets_it_go_on(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    wait = grpo.in_background("stop", "small")
    printed.wait_for("small saves and stops; waiting up to 660 s")
    assert grpo.job()["spec"]["suspend"] is True
    grpo.write_status(state="Suspending", message="saving step 12")
    printed.wait_for("Suspending: saving step 12")
    grpo.write_status({"Suspended": ("True", "Suspended", "")}, state="Suspended")
    assert wait() == 0
    assert "small is suspended. It goes on with: grpo resume small" in printed.all()
    assert grpo("stop", "small") == 0
    assert "small is suspended already." in printed.all()
    assert grpo.submit("--no-follow") == 0, "a file that does not mention suspend leaves a stop alone"
    assert grpo.job()["spec"]["suspend"] is True
    assert grpo("resume", "small") == 0
    assert grpo.job()["spec"]["suspend"] is False
    assert grpo("resume", "small") == 0
    assert "small is not suspended." in printed.all()


def test_stop_does_not_wait_for_ever(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    assert grpo("stop", "small", "--timeout", "0.5") == 83
    assert "is the operator running?" in printed.all()


def test_an_ended_job_is_neither_stopped_nor_resumed(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    grpo.write_status({"Failed": ("True", "InvalidData", "no")}, state="Failed")
    assert grpo("stop", "small") == 0
    assert "there is nothing to stop" in printed.all()
    assert grpo("resume", "small") == 64


def test_jobs_are_listed_and_one_is_shown(grpo: Grpo, printed: Printed) -> None:
    assert grpo("status") == 0
    printed.wait_for(f"No GRPOJobs in namespace {grpo.namespace}.")
    assert grpo.submit("--no-follow") == 0
    assert grpo("status", "small") == 0
    printed.wait_for("No operator has looked at this job yet")
    grpo.write_status(
        state="Training", progress={"step": 1, "totalSteps": 2}, summary={"trainers": "1/1", "rollouts": "0/1"}
    )
    assert grpo("status", "-A") == 0
    line = next(line for line in printed.all().splitlines() if line.startswith(grpo.namespace))
    assert re.match(rf"{grpo.namespace} +small +Training +1/2 +– +– +– +1/1 +0/1 +– +\d+s", line)
    assert grpo("status", "large") == 64
    printed.wait_for(f"there is no GRPOJob large in namespace {grpo.namespace}")


def test_a_namespace_that_does_not_exist_is_named(grpo: Grpo, printed: Printed) -> None:
    grpo.namespace = "nowhere"
    assert grpo.submit("--no-follow") == 64
    assert "there is no namespace nowhere. Choose one with -n." in printed.all()


def test_a_cluster_without_the_definition_says_how_to_install_it(grpo: Grpo, printed: Printed) -> None:
    with ControlPlane(controllers=False) as bare:
        grpo.kubeconfig = str(bare.kubeconfig)
        assert grpo.submit("--no-follow") == 78
        assert grpo("status") == 78
    text = printed.all()
    assert text.count("this cluster does not know GRPOJobs") == 2 and "grpo crd | kubectl apply" in text


def test_an_api_server_that_goes_away_is_waited_for_and_then_given_up(
    grpo: Grpo, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "OUTAGE_SECONDS", 1.0)
    with ControlPlane(controllers=False) as bare:
        bare.apply(crd_yaml())
        bare.wait_for_crd(PLURAL)
        grpo.kubeconfig, grpo.namespace = str(bare.kubeconfig), "default"
        wait = grpo.in_background("submit", grpo.file)
        printed.wait_for(": created")
        bare.stop()
        assert wait() == 75
    # A server on its way down first closes or resets connections, then refuses them.
    said = printed.all()
    assert re.search(
        "Connection refused|closed connection without response|Connection (reset|aborted)|broke off", said
    ), said
    assert "Trying again for 1 s." in printed.text


def test_a_person_without_rights_is_told_which_one_is_missing(grpo: Grpo, printed: Printed) -> None:
    eve = str(grpo.control_plane.user_kubeconfig("eve"))
    assert grpo("submit", grpo.file, kubeconfig=eve) == 78
    assert f"not allowed to get GRPOJob small in namespace {grpo.namespace}" in printed.all()
    assert "eve" in printed.text and "Traceback" not in printed.text


def test_following_needs_no_right_to_events(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    role = {"apiGroups": ["grpo.dev"], "resources": ["grpojobs"], "verbs": ["get"]}
    base = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "looker", "namespace": grpo.namespace}}
    grpo.control_plane.apply({**base, "kind": "Role", "rules": [role]})
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "looker"}
    subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "looker"}
    grpo.control_plane.apply({**base, "kind": "RoleBinding", "roleRef": reference, "subjects": [subject]})
    looker = str(grpo.control_plane.user_kubeconfig("looker"))
    grpo.write_status({"Succeeded": ("True", "Done", "")}, state="Succeeded")
    assert grpo("status", "small", "--follow", kubeconfig=looker) == 0
    assert "events are not shown: no right to list them" in printed.all()


def worker_pod(grpo: Grpo, role: str, index: int, *, node: str = "") -> str:
    """A pod as the operator makes it; `node`: bound to this one."""
    name = labels.pod_name("small", labels.Role(role), index)
    marks = {labels.JOB: "small", labels.ROLE: role, labels.INDEX: str(index), labels.ATTEMPT: "0"}
    container = {"name": labels.CONTAINER, "image": "none.invalid/none:1"}
    spec = {"containers": [container], **({"nodeName": node} if node else {})}
    grpo.control_plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": grpo.namespace, "labels": marks},
            "spec": spec,
        }
    )
    return name


def start(grpo: Grpo, pod: str) -> None:
    """What the kubelet writes when the container runs."""
    state = {
        "name": labels.CONTAINER, "image": "none", "imageID": "", "ready": True, "restartCount": 0,
        "state": {"running": {"startedAt": "2026-09-21T14:13:20Z"}},
    }  # fmt: skip
    grpo.patch("pod", pod, {"status": {"phase": "Running", "containerStatuses": [state]}}, "--subresource=status")


def add_node(control_plane: ControlPlane, name: str, port: int) -> None:
    """A node whose kubelet is said to listen on this port."""
    control_plane.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    addresses = [{"type": "InternalIP", "address": "127.0.0.1"}]
    status = {"addresses": addresses, "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}
    control_plane.kubectl(
        "patch", "node", name, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status})
    )


@pytest.fixture
def made_up_node(control_plane: ControlPlane) -> Iterator[str]:
    """A node of which nothing answers."""
    add_node(control_plane, "made-up", 9)
    yield "made-up"
    control_plane.kubectl("delete", "node", "made-up")


class Kubelet:
    """Answers for the logs of pods, as a kubelet does; `lines` of a pod have their time stamps."""

    def __init__(self, folder: Path) -> None:
        self.lines: dict[str, list[str]] = {}
        self.running: set[str] = set()
        self.requests: list[str] = []
        self._cuts = 0
        kubelet = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kubelet.answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                return

        key, certificate = folder / "kubelet.key", folder / "kubelet.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=kubelet", "-keyout", key, "-out", certificate],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def cut(self) -> None:
        """Break every stream off that is open."""
        self._cuts += 1

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(handler.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        pod = url.path.split("/")[3]
        self.requests.append(handler.path)
        handler.send_response(200)
        handler.end_headers()
        sent, cuts, deadline = 0, self._cuts, time.monotonic() + 30
        if "tailLines" in query:
            sent = max(0, len(self.lines[pod]) - int(query["tailLines"]))
        while time.monotonic() < deadline and cuts == self._cuts:
            follow = query.get("follow") == "true" and pod in self.running
            for line in self.lines[pod][sent:]:
                stamp, _, text = line.partition(" ")
                if stamp[:19] >= query.get("sinceTime", "")[:19]:  # whole seconds, as the kubelet
                    handler.wfile.write((line if query.get("timestamps") == "true" else text).encode() + b"\n")
                sent += 1
            if not follow:
                return
            time.sleep(0.02)


@pytest.fixture
def kubelet(control_plane: ControlPlane, tmp_path: Path) -> Iterator[Kubelet]:
    """A node of the name `played` whose kubelet is the test's."""
    played = Kubelet(tmp_path)
    add_node(control_plane, "played", played.server.server_port)
    yield played
    control_plane.kubectl("delete", "node", "played")
    played.server.shutdown()
    played.server.server_close()


def test_logs_are_printed_with_the_member_of_each_line(grpo: Grpo, printed: Printed, kubelet: Kubelet) -> None:
    assert grpo.submit("--no-follow") == 0
    for index in (0, 1):
        pod = worker_pod(grpo, "rollout", index, node="played")
        kubelet.lines[pod] = [f"2026-09-21T14:13:2{line}.5Z line {line} of {index}" for line in range(3)]
        start(grpo, pod)
    assert grpo("logs", "small", "--role", "rollout", "--tail", "2") == 0
    lines = [line for line in printed.all().splitlines() if " of " in line and line.startswith("rollout")]
    assert lines == [f"rollout-{index}  line {line} of {index}" for index in (0, 1) for line in (1, 2)]
    assert grpo("logs", "small", "--role", "rollout", "--index", "1", "--tail", "1") == 0
    assert printed.out() == "line 2 of 1\n"
    assert grpo("logs", "small", "--role", "rollout", "--attempt", "7") == 64


def test_followed_logs_go_on_after_a_cut_and_over_a_replaced_pod(
    grpo: Grpo, printed: Printed, kubelet: Kubelet
) -> None:
    assert grpo.submit("--no-follow") == 0
    pod = worker_pod(grpo, "coordinator", 0, node="played")
    kubelet.lines[pod], kubelet.running = ["2026-09-21T14:13:20.1Z first", "2026-09-21T14:13:20.2Z second"], {pod}
    start(grpo, pod)
    wait = grpo.in_background("logs", "small", "-f")
    printed.wait_for("second")
    kubelet.cut()
    kubelet.lines[pod].append("2026-09-21T14:13:20.3Z third")
    printed.wait_for("third")
    kubelet.running.clear()
    grpo.control_plane.kubectl("delete", "pod", pod, "-n", grpo.namespace, "--grace-period=0", "--force")
    printed.wait_for("waiting for a pod (role coordinator)")
    kubelet.lines[pod] = ["2026-09-21T14:14:00.1Z of the replacement"]
    start(grpo, worker_pod(grpo, "coordinator", 0, node="played"))
    printed.wait_for("of the replacement")
    grpo.write_status({"Succeeded": ("True", "Done", "")}, state="Succeeded")
    ended = {"phase": "Succeeded", "containerStatuses": None}
    grpo.patch("pod", pod, {"status": ended}, "--subresource=status")
    assert wait() == 0
    text = printed.all()
    assert [text.count(word) for word in ("first", "second", "third", "of the replacement")] == [1, 1, 1, 1]


def test_logs_of_a_job_without_pods_tell_the_last_words(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    failure = {
        "time": "2026-09-21T14:13:20Z", "pod": "small-coordinator", "role": "coordinator", "exitCode": 65, "reason": "InvalidData",
        "message": "train.parquet has no column 'reward'",
    }  # fmt: skip
    grpo.write_status(state="Failed", failures=[failure])
    assert grpo("logs", "small") == 64
    assert "No log of small to read now (role coordinator); its state is Failed." in printed.all()
    assert "small-coordinator: exit code 65, InvalidData: train.parquet has no column 'reward'" in printed.text


def test_logs_of_a_pod_that_waits_say_why(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    pod = worker_pod(grpo, "coordinator", 0)
    unscheduled = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available",
    }
    grpo.patch("pod", pod, {"status": {"conditions": [unscheduled]}}, "--subresource=status")
    assert grpo("logs", "small") == 75
    assert "coordinator has not started: not scheduled: 0/3 nodes are available" in printed.all()


@pytest.mark.parametrize("options", [[], ["--tail", "5"]])
def test_logs_of_a_node_that_does_not_answer_say_so(
    grpo: Grpo, printed: Printed, made_up_node: str, options: Sequence[str]
) -> None:
    assert grpo.submit("--no-follow") == 0
    for index in (0, 1):
        start(grpo, worker_pod(grpo, "rollout", index, node=made_up_node))
    assert grpo("logs", "small", "--role", "rollout", *options) == 75
    assert "connection refused" in printed.all()
    assert "small-rollout-0" in printed.text and "small-rollout-1" in printed.text and "Traceback" not in printed.text


def test_followed_logs_end_with_the_job(grpo: Grpo, printed: Printed) -> None:
    assert grpo.submit("--no-follow") == 0
    wait = grpo.in_background("logs", "small", "-f")
    printed.wait_for("waiting for a pod (role coordinator)")
    worker_pod(grpo, "coordinator", 0)
    printed.wait_for("coordinator has not started: phase Pending")
    grpo.write_status({"Failed": ("True", "Unschedulable", "no GPU")}, state="Failed")
    assert wait() == 64
    assert "small ended, and no pod (role coordinator) had started." in printed.all()
