"""The operator is killed, doubled and misled; the jobs do not notice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.cluster import ControlPlane
from e2e.cluster.host import wait_until
from operator_process import ROOT, Cluster, Operator, install


@pytest.fixture(scope="module")
def prepared(control_plane: ControlPlane) -> ControlPlane:
    install(control_plane)
    return control_plane


@pytest.fixture
def cluster(prepared: ControlPlane, namespace: str) -> Cluster:
    return Cluster(prepared, namespace)


@pytest.fixture
def operators(cluster: Cluster, tmp_path: Path) -> Iterator[list[Operator]]:
    """Two that share a Lease and see this test's namespace alone; not started."""
    arguments = (f"--namespaces={cluster.namespace}", f"--lease-namespace={cluster.namespace}")
    both = [Operator(cluster.control_plane.kubeconfig, tmp_path, *arguments, name=name) for name in ("first", "second")]
    yield both
    for one in both:
        one.kill()
        if one.log.exists():
            print(one.name, one.words())


def give_up_lease(cluster: Cluster) -> None:
    """So that an operator that was killed need not be waited for."""
    cluster.kubectl("delete", "lease", "grpo-operator", "--ignore-not-found")


def test_kills_at_any_moment_lose_and_double_nothing(cluster: Cluster, operators: list[Operator]):
    operator = operators[0].start().wait_leading()
    cluster.submit(failurePolicy={"backoffSeconds": 1, "maxRestarts": 50})
    cluster.run_all()
    rollouts = {name: uid for name, uid in cluster.uids().items() if "rollout" in name}
    chance = random.Random(7)
    failed = []
    for kill in range(4):  # the back-off doubles
        trainer = cluster.pods()["trainer-0"]
        failed.append(trainer["metadata"]["uid"])
        cluster.end_pod(trainer, 70, json.dumps({"reason": "Crashed", "message": "a bug"}))
        time.sleep(chance.uniform(0.0, 0.4))  # the very point: anywhere in what follows
        operator.signal(signal.SIGKILL)
        give_up_lease(cluster)
        operator.start().wait_leading()
        cluster.wait(
            "a new set is there",
            lambda seen=tuple(failed): (
                cluster.uids().get("trainer-0") not in (None, *seen) and len(cluster.pods()) == 4
            ),
            timeout_seconds=60,
        )
        cluster.run_all()
        assert cluster.status()["restarts"] == kill + 1
    status = cluster.status()
    assert status["attempt"] == 4
    acted = [failure["podUID"] for failure in status["failures"] if failure["counted"]]
    assert acted == failed[::-1]
    assert {name: uid for name, uid in cluster.uids().items() if "rollout" in name} == rollouts


def test_one_of_two_operators_acts_and_the_other_takes_over(cluster: Cluster, operators: list[Operator]):
    first, second = operators
    first.start().wait_leading()
    second.start().wait_ready()
    cluster.submit()
    cluster.run_all()
    assert second.metric("grpo_operator_leader") == 0
    writes = [
        tags
        for name, tags, _ in second.samples()
        if name == "grpo_operator_api_requests_total" and tags["verb"] not in ("get", "list")
    ]
    assert writes == []
    assert second.http("/healthz")[0] == 200
    first.signal(signal.SIGKILL)
    second.wait_leading(timeout_seconds=40)
    cluster.end_pod(cluster.pods()["rollout-0"], 70)
    cluster.wait(
        "the second one replaces the pod",
        lambda: cluster.pods().get("rollout-0", {}).get("status", {}).get("phase") == "Pending",
    )


def test_sigterm_gives_the_lease_back_at_once(cluster: Cluster, operators: list[Operator]):
    first, second = operators
    first.start().wait_leading()
    second.start().wait_ready()
    assert first.signal(signal.SIGTERM) == 0
    assert "Ended." in first.words()
    started = time.monotonic()
    second.wait_leading(timeout_seconds=10)
    assert time.monotonic() - started < 6


def test_an_operator_that_loses_its_lease_ends(cluster: Cluster, operators: list[Operator]):
    operator = operators[0].start().wait_leading()
    stolen = {"spec": {"holderIdentity": "thief", "renewTime": "2100-01-01T00:00:00.000000Z"}}
    cluster.kubectl("patch", "lease", "grpo-operator", "--type=merge", "-p", json.dumps(stolen))
    assert operator.process is not None
    assert operator.process.wait(20) == 1
    assert "thief leads now" in operator.words()


def test_an_operator_frozen_past_its_lease_writes_nothing_when_it_wakes(cluster: Cluster, operators: list[Operator]):
    first, second = operators
    first.start().wait_leading()
    cluster.submit()
    cluster.run_all()
    assert first.process is not None
    first.process.send_signal(signal.SIGSTOP)
    second.start().wait_leading(timeout_seconds=40)
    cluster.end_pod(cluster.pods()["rollout-0"], 70)
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(20) == 1
    cluster.wait(
        "the pod is replaced once",
        lambda: cluster.pods().get("rollout-0", {}).get("status", {}).get("phase") == "Pending",
    )
    assert len([one for one in cluster.status()["failures"] if one["role"] == "rollout"]) == 1


def test_a_job_that_went_while_nobody_looked_is_forgotten_and_a_change_is_found(
    cluster: Cluster, operators: list[Operator]
):
    operator = operators[0].start().wait_leading()
    cluster.submit()
    cluster.submit("other")
    cluster.run_all()
    cluster.run_all("other")
    operator.signal(signal.SIGKILL)
    give_up_lease(cluster)
    cluster.kubectl("delete", "grpojob", "other")
    cluster.end_pod(cluster.pods()["rollout-1"], 70)
    operator.start().wait_leading()
    cluster.wait(
        "the pod is replaced", lambda: cluster.pods().get("rollout-1", {}).get("status", {}).get("phase") == "Pending"
    )
    wait_until(lambda: operator.metric("grpo_operator_jobs") == 1, "one job is known", timeout_seconds=20)


def test_rights_in_one_namespace_are_enough_for_an_operator_of_one_namespace(cluster: Cluster, tmp_path: Path):
    namespace = cluster.namespace
    templates = [f"--show-only=templates/{name}.yaml" for name in ("serviceaccount", "rbac")]
    scope = ["--set=rbac.scope=namespaced", f"--set=rbac.namespaces={{{namespace}}}", "--kube-version=1.36.3"]
    chart = str(ROOT / "charts" / "grpo-operator")
    cluster.control_plane.apply(
        cluster.control_plane.helm("template", "grpo-operator", chart, "--namespace", namespace, *scope, *templates)
    )
    kubeconfig = cluster.control_plane.service_account_kubeconfig(namespace, "grpo-operator")
    operator = Operator(kubeconfig, tmp_path, f"--namespaces={namespace}", f"--lease-namespace={namespace}").start()
    try:
        operator.wait_leading()
        cluster.submit()
        cluster.run_all()
        cluster.end_pod(cluster.pods()["rollout-0"], 70)
        cluster.wait(
            "the pod is replaced",
            lambda: cluster.pods().get("rollout-0", {}).get("status", {}).get("phase") == "Pending",
        )
        assert "cannot" not in operator.log.read_text() and "WARNING" not in operator.log.read_text()
        print(f"resident: {operator.resident_mebibytes():.0f} MiB")
    finally:
        operator.kill()
        print(operator.words())


def run_once(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grpo_operator", "--worker-image=x", *arguments]
    clean = {name: value for name, value in os.environ.items() if name not in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST")}
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)


def test_what_keeps_the_operator_from_starting_is_said(prepared: ControlPlane, tmp_path: Path):
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    nobody = prepared.user_kubeconfig("nobody")
    for environment, arguments, said in (
        (
            {"KUBECONFIG": str(prepared.kubeconfig)},
            (f"--token-key-file={tmp_path}/absent",),
            "mount the chart's Secret there",
        ),
        ({"KUBECONFIG": str(tmp_path / "absent")}, (f"--token-key-file={key}",), "set KUBECONFIG to a readable file"),
        ({"KUBECONFIG": str(nobody)}, (f"--token-key-file={key}",), "may not list grpojobs.grpo.dev in all namespaces"),
        (
            {"KUBECONFIG": str(nobody)},
            (f"--token-key-file={key}", "--namespaces=default"),
            "may not list grpojobs.grpo.dev in namespace default. Install the chart with rbac.create=true",
        ),
    ):
        done = run_once(environment, *arguments)
        assert said in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 78


def test_a_cluster_without_the_crd_is_said(tmp_path: Path):
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    with ControlPlane(controllers=False) as bare:
        done = run_once({"KUBECONFIG": str(bare.kubeconfig)}, f"--token-key-file={key}")
    assert done.returncode == 78 and "the CRD is not installed" in done.stderr, done.stderr
