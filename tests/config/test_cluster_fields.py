"""What only a cluster uses is known field by field, and a pod template cannot leave the pod."""

from typing import Any

import pytest
from job_documents import DOCUMENT, GOOD

from grpo_worker.config import Spec, job_from_document, parse_yaml
from grpo_worker.config.cluster import cluster_only_fields
from grpo_worker.config.load import apply_override
from grpo_worker.config.pod_template import forbidden_pod_settings


def spec(*overrides: str) -> Spec:
    raw = parse_yaml(DOCUMENT, "test")
    for override in overrides:
        apply_override(raw, override)
    return job_from_document(raw).spec


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ([], []),
        (["suspend=false", "runtime.shmSize=8Gi", "runtime.volumes=[]", "rollout.replicas=2"], []),
        (["suspend=true", "rollout.maxReplicas=2"], ["rollout.maxReplicas", "suspend"]),
        (["runtime.workspace={claimName: a}", "runtime.device=cpu"], ["runtime.workspace"]),
        (["runtime.resources={trainer: {limits: {cpu: 1}}}"], ["runtime.resources.trainer"]),
        (["runtime.podTemplate.all.spec.dnsPolicy=None"], ["runtime.podTemplate.all"]),
        (["scheduling.nodeSelector={a: b}"], ["scheduling.nodeSelector"]),
        (["network.rdma={resource: rdma/a}", "network.socketInterface=eth0"], ["network.rdma"]),
        (["failurePolicy.rules=[{action: FailJob, exitCodes: [1]}]"], ["failurePolicy.rules"]),
    ],
)
def test_fields_that_a_local_run_leaves_aside_are_named(overrides: list[str], fields: list[str]) -> None:
    assert cluster_only_fields(spec(*overrides)) == fields


@pytest.mark.parametrize(
    ("template", "paths"),
    [
        ({}, []),
        ({"metadata": None, "spec": None}, []),
        ({"spec": {"hostNetwork": False, "volumes": [{"name": "a", "emptyDir": {}}]}}, []),
        ({"spec": {"hostNetwork": True, "hostPID": True, "hostIPC": True}}, ["spec.hostNetwork", "spec.hostPID", "spec.hostIPC"]),
        ({"spec": {"volumes": [{"name": "a"}, {"name": "b", "hostPath": {"path": "/"}}]}}, ["spec.volumes[1].hostPath"]),
        ({"spec": {"volumes": [{"hostPath": None}]}}, ["spec.volumes[0] (has no name)"]),
        ({"spec": {"volumes": "a"}}, ["spec.volumes[?] (has no name)"]),
        (
            {"spec": {"containers": [{"name": "worker", "securityContext": {"privileged": True}}]}},
            ["spec.containers[0].securityContext.privileged"],
        ),
        (
            {"spec": {"initContainers": [{"name": "a", "securityContext": {"allowPrivilegeEscalation": True}}]}},
            ["spec.initContainers[0].securityContext.allowPrivilegeEscalation"],
        ),
        ({"spec": {"containers": [{"image": "a"}]}}, ["spec.containers[0] (has no name)"]),
        ({"spec": {"hostname": "a", "ephemeralContainers": []}}, ["spec.hostname", "spec.ephemeralContainers"]),
        ({"metadata": {"labels": {"grpo.dev/role": "a", "team": "b"}}}, ["metadata.labels.grpo.dev/role"]),
    ],
)  # fmt: skip
def test_settings_that_leave_the_pod_or_belong_to_the_operator_are_named(
    template: dict[str, Any], paths: list[str]
) -> None:
    assert forbidden_pod_settings(template) == paths


def test_patches_come_in_the_order_of_their_application() -> None:
    templates = spec("runtime.podTemplate={all: {spec: {a: 1}}, trainer: {spec: {a: 2}}}").runtime.pod_template
    assert templates.of("trainer") == [{"spec": {"a": 1}}, {"spec": {"a": 2}}]
    assert templates.of("rollout") == [{"spec": {"a": 1}}]


def test_a_role_without_resources_has_empty_ones() -> None:
    resources = spec("runtime.resources={trainer: {limits: {cpu: 4, memory: 64Gi}}}").runtime.resources
    assert resources.of("trainer").limits == {"cpu": "4", "memory": "64Gi"}
    assert resources.of("rollout").limits == {}


def test_the_table_of_sound_documents_sets_most_of_the_fields_of_a_cluster() -> None:
    named = {field for case in GOOD for field in cluster_only_fields(spec(*[o for o in case if "metadata" not in o]))}
    assert {"suspend", "runtime.workspace", "runtime.volumes", "network.rdma", "failurePolicy.rules"} <= named
