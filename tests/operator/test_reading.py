"""Pods and jobs of the API become facts."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from plan_world import document

from grpo_operator.control.read_job import read_job
from grpo_operator.control.read_pod import read_pod
from grpo_operator.facts import Ended, LastWord, Waiting
from grpo_operator.labels import ATTEMPT, INDEX, ROLE, Role

AT = "2026-11-22T12:00:00Z"
TIME = datetime(2026, 11, 22, 12, tzinfo=UTC)


def api_pod(status: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    labels = {ROLE: "rollout", INDEX: "3", ATTEMPT: "2"}
    return {
        "metadata": {"name": "demo-rollout-3", "uid": "u", "creationTimestamp": AT, "labels": labels, **metadata},
        "spec": {"volumes": [{"name": "tmp"}, {"name": "config", "configMap": {"name": "demo-0a1b2c3d"}}]},
        "status": status or {},
    }


def gone(name: str, exit_code: int) -> dict[str, Any]:
    """The status of a container that has ended."""
    return {"name": name, "state": {"terminated": {"exitCode": exit_code, "reason": "Error", "finishedAt": AT}}}


def worker(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "worker", "state": state}]}


def test_a_new_pod() -> None:
    pod = read_pod(api_pod({"phase": "Pending"}))
    assert (pod.role, pod.index, pod.attempt, pod.created, pod.config) == (Role.ROLLOUT, 3, 2, TIME, "demo-0a1b2c3d")
    assert not (pod.scheduled or pod.started or pod.ready or pod.deleting or pod.ended or pod.waiting)


def test_a_pod_that_no_node_takes() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    pod = read_pod(api_pod({"phase": "Pending", "conditions": [condition]}))
    assert (pod.scheduled, pod.unschedulable) == (False, "0/1 nodes")


def test_a_running_pod_that_is_being_preempted() -> None:
    conditions = [
        {"type": "PodScheduled", "status": "True"},
        {"type": "Ready", "status": "True"},
        {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"},
        {"type": "PodReadyToStartContainers", "status": "False"},
    ]
    status = {"phase": "Running", "podIP": "10.1.2.3", "conditions": conditions, **worker(running={"startedAt": AT})}
    pod = read_pod(api_pod(status, deletionTimestamp=AT))
    assert pod.scheduled and pod.started and pod.ready and pod.ip == "10.1.2.3"
    assert (pod.deletion_deadline, pod.disruption) == (TIME, "PreemptionByScheduler")
    assert pod.conditions == ("DisruptionTarget", "PodScheduled", "Ready")


@pytest.mark.parametrize(
    ("status", "ended"),
    [
        (worker(terminated={"exitCode": 65, "reason": "Error", "finishedAt": AT, "startedAt": AT, "message": '{"reason": "InvalidData", "message": "no column", "step": 4, "checkpoint": "c/4"}'}),
         Ended(65, "Error", TIME, LastWord("InvalidData", "no column", 4, "c/4"))),
        (worker(terminated={"exitCode": 1, "reason": "Error", "finishedAt": AT, "message": "Traceback"}), Ended(1, "Error", TIME, None, "Traceback")),
        (worker(terminated={"exitCode": 1, "reason": "Error", "finishedAt": AT, "message": '["a list"]'}), Ended(1, "Error", TIME, None, '["a list"]')),
        (worker(terminated={"exitCode": 137, "reason": "OOMKilled", "finishedAt": AT}), Ended(137, "OOMKilled", TIME, None)),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, Ended(None, "Evicted", None, None, "low on memory")),
        ({"phase": "Failed", "reason": "Evicted", "message": "low", **worker(terminated={"exitCode": 137, "reason": "Error", "finishedAt": AT})},
         Ended(137, "Evicted", TIME, None, "low")),
        ({"phase": "Failed", "initContainerStatuses": [{"name": "fetch", "state": {"terminated": {"exitCode": 3, "reason": "Error", "finishedAt": AT}}}]},
         Ended(3, "Error", TIME, None)),
        ({"phase": "Running", "initContainerStatuses": [{"name": "fetch", "state": {"terminated": {"exitCode": 0, "finishedAt": AT}}}], **worker(running={})}, None),
        # a sidecar keeps the pod running: the worker's end counts
        ({"phase": "Running", "containerStatuses": [{"name": "sidecar", "state": {"running": {}}}, {"name": "worker", "state": {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": AT}}}]},
         Ended(0, "Completed", TIME, None)),
        # whatever ends beside a worker that lives, or has ended by itself, is not its end
        ({"phase": "Running", "containerStatuses": [gone("a-mesh", 143), {"name": "worker", "state": {"running": {}}}]}, None),
        ({"phase": "Running", "containerStatuses": [{"name": "worker", "state": {"running": {}}}, gone("z-logs", 1)]}, None),
        ({"phase": "Running", "initContainerStatuses": [gone("mesh", 143)], **worker(running={})}, None),
        ({"phase": "Failed", "containerStatuses": [gone("a-mesh", 143), gone("worker", 0)]}, Ended(0, "Error", TIME, None)),
        ({"phase": "Failed", "containerStatuses": [gone("a-mesh", 143), gone("worker", 75), gone("z", 1)]}, Ended(75, "Error", TIME, None)),
        # before it has run: a failed init container keeps it from that, a sidecar does not
        ({"phase": "Pending", "containerStatuses": [gone("a-mesh", 1), {"name": "worker", "state": {"waiting": {}}}]}, None),
        ({"phase": "Pending", "initContainerStatuses": [gone("fetch", 3)], **worker(waiting={"reason": "PodInitializing"})}, Ended(3, "Error", TIME, None)),
        ({"phase": "Failed", "containerStatuses": [gone("a-mesh", 1), {"name": "worker", "state": {"waiting": {}}}]}, Ended(1, "Error", TIME, None)),
    ],
)  # fmt: skip
def test_how_a_pod_ended(status: dict[str, Any], ended: Ended | None) -> None:
    assert read_pod(api_pod(status)).ended == ended


@pytest.mark.parametrize(
    "said",
    [
        "[" * 4000,
        json.dumps({"reason": "x" * 65}),
        json.dumps({"reason": "two words"}),
        json.dumps({"reason": ""}),
    ],
)
def test_a_last_word_that_is_none_of_ours_is_text(said: str) -> None:
    end = read_pod(api_pod(worker(terminated={"exitCode": 1, "finishedAt": AT, "message": said}))).ended
    assert end is not None and end.last_word is None and end.message == said


def test_what_a_pod_waits_for() -> None:
    init = {
        "initContainerStatuses": [{"name": "fetch", "state": {"waiting": {"reason": "ErrImagePull", "message": "404"}}}]
    }
    pod = read_pod(api_pod({**init, **worker(waiting={"reason": "PodInitializing"})}))
    assert pod.waiting == Waiting("ErrImagePull", "404")


@pytest.mark.parametrize(
    "labels", [{}, {ROLE: "boss", INDEX: "0", ATTEMPT: "0"}, {ROLE: "rollout", INDEX: "x", ATTEMPT: "0"}]
)
def test_a_pod_with_strange_labels_is_refused(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no valid label"):
        read_pod(api_pod(labels=labels))


def test_a_valid_job() -> None:
    job = read_job({**document(), "status": {"attempt": 3, "state": "Training", "kopf": {"x": 1}}})
    assert job.spec is not None and job.spec.rollout.replicas == 2
    assert (job.name, job.namespace, job.uid, job.generation, job.status.attempt) == ("demo", "rl", "job-uid", 1, 3)
    assert not job.deleting and "status" not in job.document


def test_an_invalid_job_says_everything_that_is_wrong() -> None:
    job = read_job(document(rollout={"replicas": 0}, trainer={"nodes": "many"}))
    assert job.spec is None and "rollout.replicas" in job.invalid and "trainer.nodes" in job.invalid


@pytest.mark.parametrize(
    "broken", [{"restarts": "many"}, {"conditions": [{"type": "Nonsense", "status": "True"}]}, {"budget": 7}]
)
def test_a_spoilt_part_of_a_status_does_not_take_the_rest_with_it(broken: dict[str, Any]) -> None:
    assert read_job({**document(), "status": {"attempt": 3, **broken}}).status.attempt == 3


def test_a_job_that_has_started_is_held_to_no_newer_rules() -> None:
    contradiction = document(rollout={"temperature": 0.7, "topP": 0.9})
    assert "topP" in read_job(contradiction).invalid
    started = read_job({**contradiction, "status": {"startTime": "2026-11-26T00:00:00Z"}})
    assert started.invalid == "" and started.spec is not None
