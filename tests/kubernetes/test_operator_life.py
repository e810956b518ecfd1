"""A job's life under the real operator and a real API server; the tests play the kubelet."""

import base64
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from e2e.cluster import ControlPlane
from e2e.cluster.host import free_ports, wait_until
from operator_process import KEY, OPERATOR_NAMESPACE, ROOT, Cluster, FakeCoordinator, Operator, install

from grpo_operator import build
from grpo_operator.control.read_job import read_job
from grpo_operator.token import job_token

DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    kubeconfig = install(control_plane)
    running = Operator(kubeconfig, tmp_path_factory.mktemp("operator")).start()
    try:
        yield running.wait_leading()
    finally:
        running.kill()
        print(running.words())


@pytest.fixture
def cluster(control_plane: ControlPlane, operator: Operator, namespace: str) -> Cluster:
    return Cluster(control_plane, namespace)


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    (port,) = free_ports(1)
    with FakeCoordinator(port).serving() as serving:
        yield serving


def test_a_job_gets_its_children_trains_and_succeeds(
    cluster: Cluster, coordinator: FakeCoordinator, operator: Operator
):
    uid = cluster.submit(network={"coordinatorPort": coordinator.port})["metadata"]["uid"]
    coordinator.trains(3)
    cluster.run_all()
    assert set(cluster.pods()) == {"coordinator", "trainer-0", "rollout-0", "rollout-1"}
    for pod in cluster.pods().values():
        (owner,) = pod["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (uid, True)
        assert pod["metadata"]["labels"]["grpo.dev/job-uid"] == uid
        assert "finalizers" not in pod["metadata"]
    kinds = [child.split("/")[0] for child in cluster.children()]
    assert kinds == [
        "ConfigMap",
        "NetworkPolicy",
        "Pod",
        "Pod",
        "Pod",
        "Pod",
        "PodDisruptionBudget",
        "Secret",
        "Service",
    ]
    secret = cluster.control_plane.get("secret", "demo-token", "-n", cluster.namespace)
    assert base64.b64decode(secret["data"]["token"]).decode() == job_token(KEY, uid)

    cluster.wait("step 3 is reported", lambda: cluster.status().get("progress", {}).get("step") == 3)
    assert coordinator.tokens == {f"Bearer {job_token(KEY, uid)}"}
    assert cluster.status()["state"] == "Training"
    assert operator.metric("grpo_job_step", namespace=cluster.namespace, grpojob="demo") == 3
    assert operator.metric("grpo_job_pods", namespace=cluster.namespace, phase="Running") == 4

    coordinator.trains(40, state="Succeeded")
    for pod in cluster.pods().values():
        cluster.end_pod(pod, 0)
    cluster.wait("the job has succeeded", lambda: cluster.condition("Succeeded").get("status") == "True")
    assert len(cluster.pods()) == 4, "ended pods stay for their logs"
    job = cluster.control_plane.get("grpojob", "demo", "-n", cluster.namespace, "--show-managed-fields")
    assert job["status"]["state"] == "Succeeded" and job["status"].get("restarts", 0) == 0
    assert not job["metadata"].get("finalizers") and not job["metadata"].get("annotations")
    assert {field["manager"] for field in job["metadata"]["managedFields"]} == {"kubectl", "grpo-operator"}


def test_a_lost_trainer_restarts_the_set_and_leaves_the_rollouts(cluster: Cluster):
    cluster.submit(failurePolicy={"backoffSeconds": 1})
    cluster.run_all()
    before = cluster.uids()
    cluster.end_pod(cluster.pods()["trainer-0"], 70, json.dumps({"reason": "Crashed", "message": "a bug"}))
    cluster.wait(
        "a new set is there",
        lambda: {cluster.uids().get(n) for n in ("coordinator", "trainer-0")}.isdisjoint({None, *before.values()}),
    )
    after = cluster.uids()
    assert {after["rollout-0"], after["rollout-1"]} == {before["rollout-0"], before["rollout-1"]}
    status = cluster.status()
    assert (status["attempt"], status["restarts"]) == (1, 1)
    (failure,) = status["failures"]
    assert (failure["podUID"], failure["exitCode"], failure["counted"]) == (before["trainer-0"], 70, True)
    assert cluster.pods()["trainer-0"]["metadata"]["labels"]["grpo.dev/attempt"] == "1"
    events = cluster.control_plane.get("events", "-n", cluster.namespace)["items"]
    assert any(event["type"] == "Warning" and "trainer-0" in event["message"] for event in events)


def test_a_lost_rollout_pod_is_replaced_alone(cluster: Cluster):
    cluster.submit(failurePolicy={"backoffSeconds": 1})
    cluster.run_all()
    before = cluster.uids()
    cluster.end_pod(cluster.pods()["rollout-1"], 137, conditions=(DISRUPTED,))
    cluster.wait("rollout-1 is new", lambda: cluster.uids().get("rollout-1") not in (None, before["rollout-1"]))
    after = cluster.uids()
    assert {name for name in before if before[name] != after.get(name)} == {"rollout-1"}
    assert cluster.status().get("restarts", 0) == 0


def test_data_that_is_wrong_fails_the_job_at_once_in_the_process_s_words(cluster: Cluster):
    cluster.submit()
    cluster.run_all()
    said = {"reason": "InvalidData", "message": "data.trainFiles[0]: train.parquet has no column 'reward'"}
    cluster.end_pod(cluster.pods()["coordinator"], 65, json.dumps(said))
    cluster.wait("the job has failed", lambda: cluster.condition("Failed").get("status") == "True")
    assert "no column 'reward'" in cluster.condition("Failed")["message"]


def test_a_suspended_job_has_no_pods_until_it_is_resumed(cluster: Cluster):
    cluster.submit(suspend=True)
    cluster.wait("it is Suspended", lambda: cluster.condition("Suspended").get("status") == "True")
    assert cluster.pods() == {}
    cluster.patch("demo", {"suspend": False})
    cluster.run_all()


def test_suspending_asks_the_coordinator_to_save_and_then_frees_the_pods(
    cluster: Cluster, coordinator: FakeCoordinator
):
    cluster.submit(network={"coordinatorPort": coordinator.port})
    coordinator.trains(3)
    cluster.run_all()
    cluster.wait("step 3 is reported", lambda: cluster.status().get("progress", {}).get("step") == 3)
    cluster.patch("demo", {"suspend": True})
    cluster.wait("the coordinator is asked", lambda: coordinator.stops > 0)
    coordinator.document = {}
    for pod in cluster.pods().values():
        cluster.end_pod(pod, 80, json.dumps({"reason": "Yielded", "message": "saved", "step": 3}))
    cluster.wait("all pods are gone", lambda: cluster.pods() == {})
    cluster.wait("it is Suspended", lambda: cluster.condition("Suspended").get("status") == "True")
    cluster.patch("demo", {"suspend": False})
    cluster.run_all()
    assert cluster.status().get("restarts", 0) == 0


def test_scaling_adds_and_removes_rollout_pods_and_leaves_no_unused_config(cluster: Cluster):
    cluster.submit()
    cluster.run_all()
    before = cluster.uids()
    cluster.kubectl("scale", "grpojob", "demo", "--replicas=3")
    cluster.run_all(count=5)
    cluster.kubectl("scale", "grpojob", "demo", "--replicas=1")
    cluster.wait("one rollout pod is left", lambda: set(cluster.pods()) == {"coordinator", "trainer-0", "rollout-0"})
    after = cluster.uids()
    assert all(before[name] == uid for name, uid in after.items())


def test_deletion_leaves_nothing(cluster: Cluster, operator: Operator):
    cluster.submit()
    cluster.run_all()
    cluster.wait("its metrics are there", lambda: operator.metric("grpo_job_info", namespace=cluster.namespace) == 1)
    cluster.kubectl("delete", "grpojob", "demo")
    wait_until(
        lambda: cluster.children() == [],
        "all children are gone",
        timeout_seconds=60,
        explain=lambda: str(cluster.children()),
    )
    wait_until(
        lambda: math.isnan(operator.metric("grpo_job_info", namespace=cluster.namespace)),
        "its metrics are gone",
        timeout_seconds=20,
    )


def test_a_job_that_cannot_be_made_says_why_and_does_not_hold_up_the_others(
    cluster: Cluster, control_plane: ControlPlane
):
    other = Cluster(control_plane, control_plane.create_namespace())
    limits = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "tiny", "namespace": cluster.namespace}}
    control_plane.apply(limits | {"spec": {"limits": [{"type": "Pod", "max": {"memory": "1Mi"}}]}})
    cluster.submit()
    other.submit()
    other.run_all()

    def told() -> bool:
        return "maximum memory usage per Pod is 1Mi" in (cluster.condition("Scheduled").get("message") or "")

    cluster.wait("the refusal is in the status", told)
    assert cluster.condition("Scheduled")["reason"] == "PodRefused"
    events = control_plane.get("events", "-n", cluster.namespace)["items"]
    assert any(event["reason"] == "PodRefused" for event in events)

    control_plane.kubectl("-n", cluster.namespace, "delete", "limitrange", "tiny")
    cluster.run_all()
    cluster.wait("the refusal is over", lambda: cluster.condition("Scheduled").get("status") == "True")


@pytest.mark.parametrize(("counted", "refused"), [("count/pods", "coordinator"), ("count/services", "Service demo")])
def test_a_quota_that_refuses_is_told_in_its_own_words_until_it_lets_the_job_pass(
    cluster: Cluster, control_plane: ControlPlane, counted: str, refused: str
):
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team", "namespace": cluster.namespace}}
    control_plane.apply(quota | {"spec": {"hard": {counted: "0"}}})
    # What the quota's controller, which does not run here, would write: until then nothing of the kind passes.
    status = json.dumps({"status": {"hard": {counted: "0"}, "used": {counted: "0"}}})
    cluster.kubectl("patch", "resourcequota", "team", "--subresource=status", "--type=merge", "-p", status)
    cluster.submit()

    def told() -> bool:
        condition = cluster.condition("Scheduled")
        return (
            condition.get("reason") == "QuotaExceeded"
            and f"exceeded quota: team, requested: {counted}=1" in condition["message"]
        )

    cluster.wait("the refusal is in the status", told)
    assert cluster.condition("Scheduled")["message"].startswith(f"{refused} was refused by the API server")
    assert "exceeded quota: team" in cluster.status()["message"]
    cluster.kubectl("delete", "resourcequota", "team")
    cluster.run_all()
    cluster.wait("the refusal is over", lambda: cluster.condition("Scheduled").get("status") == "True")


@pytest.mark.parametrize("kind", ["Secret", "ConfigMap", "Pod"])
def test_what_somebody_else_made_under_a_name_of_ours_is_left_alone(cluster: Cluster, kind: str):
    job = cluster.submit(suspend=True)
    name = {"Secret": "demo-token", "ConfigMap": build.config_map_name(read_job(job)), "Pod": "demo-coordinator"}[kind]
    theirs = {
        "Secret": ["create", "secret", "generic", name, "--from-literal=password=mine"],
        "ConfigMap": ["create", "configmap", name, "--from-literal=mine=yes"],
        "Pod": ["run", name, "--image=mine"],
    }
    cluster.kubectl(*theirs[kind])
    before = cluster.control_plane.get(kind, name, "-n", cluster.namespace)
    cluster.patch("demo", {"suspend": False})

    def said() -> bool:
        events = cluster.control_plane.get("events", "-n", cluster.namespace)["items"]
        return any(event["reason"] == "NameTaken" and f"{kind} {name}" in event["message"] for event in events)

    cluster.wait("the clash is said", said)
    assert cluster.control_plane.get(kind, name, "-n", cluster.namespace) == before
    cluster.kubectl("delete", kind, name)
    cluster.run_all()


def test_the_ttl_deletes_the_job(cluster: Cluster):
    cluster.submit(ttlSecondsAfterFinished=1)
    cluster.run_all()
    pods = cluster.pods()
    for name in ("trainer-0", "coordinator"):  # the job ends with its coordinator, and takes the others along
        cluster.end_pod(pods[name], 0)

    def gone() -> bool:
        return cluster.control_plane.get("grpojobs", "-n", cluster.namespace)["items"] == []

    wait_until(gone, "the job is gone", timeout_seconds=30)


def test_the_operator_is_well_and_small(operator: Operator):
    assert operator.http("/healthz") == (200, "ok")
    assert operator.metric("grpo_operator_watch_overdue_seconds") < 30
    assert operator.resident_mebibytes() < 150


def test_every_granted_verb_is_used_and_no_other_is_asked_for(operator: Operator, control_plane: ControlPlane):
    """Runs last: it judges by what the tests above made the operator do. The role itself refused all else already."""
    used = {
        (tags["resource"], tags["verb"])
        for name, tags, value in operator.samples()
        if name == "grpo_operator_api_requests_total" and value > 0
    }
    assert "cannot" not in operator.log.read_text(), "RBAC's words for a verb that is not granted"
    granted = set()
    for role in (
        control_plane.get("clusterrole", "grpo-operator"),
        control_plane.get("role", "grpo-operator-lease", "-n", OPERATOR_NAMESPACE),
    ):
        for rule in role["rules"]:
            granted |= {(resource, verb) for resource in rule["resources"] for verb in rule["verbs"]}
    without_a_call = {
        ("grpojobs", "watch"),  # kopf's
        ("pods", "watch"),  # kopf's
        ("grpojobs/finalizers", "update"),  # asked for by an admission plug-in when a child names its owner
        ("grpojobs", "get"),  # after a conflict of versions: test_operator_execute
        ("events", "patch"),  # for the same words half a minute later: test_operator_execute
    }
    print("used:", sorted(used))
    assert used <= granted
    assert granted - used - without_a_call == set()


def test_the_selfcheck_of_the_chart_passes(operator: Operator, control_plane: ControlPlane, namespace: str):
    command = [sys.executable, "-m", "grpo_operator", "selfcheck", f"--namespace={namespace}"]
    command += [f"--readyz-url=http://127.0.0.1:{operator.port}/readyz"]
    environment = os.environ | {"KUBECONFIG": str(control_plane.kubeconfig)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "All is well" in done.stderr
