"""`runtime.podTemplate`: what a patch changes, what it leaves, what it may not do."""

from dataclasses import replace
from typing import Any

import pytest
from build_jobs import SETTINGS, env_of, job_of, pod_of, worker_of

from grpo_operator import build
from grpo_operator.build.patch import merge
from grpo_operator.facts import Job
from grpo_operator.labels import Role
from grpo_worker.config.runtime import Runtime


def template(**roles: dict[str, Any]) -> dict[str, Any]:
    return {"runtime": {"workspace": {"claimName": "work"}, "podTemplate": roles}}


def test_the_roles_own_patch_wins_over_the_one_for_all() -> None:
    spec = template(
        all={"metadata": {"annotations": {"team": "a", "who": "all"}}},
        trainer={"metadata": {"annotations": {"who": "trainer"}}},
    )
    annotations = pod_of(spec)["metadata"]["annotations"]
    assert {"team": "a", "who": "trainer"}.items() <= annotations.items()
    assert pod_of(spec, Role.ROLLOUT)["metadata"]["annotations"]["who"] == "all"


def test_containers_volumes_and_variables_merge_by_name() -> None:
    patch = {
        "containers": [
            {
                "name": "worker",
                "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "MINE", "value": "1"}],
                "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                "resources": {"limits": {"memory": "4Gi"}},
            },
            {"name": "sidecar", "image": "side:1"},
        ],
        "volumes": [{"name": "scratch", "emptyDir": {}}, {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
        "initContainers": [{"name": "fetch", "image": "fetch:1"}],
    }
    pod = pod_of(template(trainer={"spec": patch}))
    assert [one["name"] for one in pod["spec"]["containers"]] == ["worker", "sidecar"]
    assert [one["name"] for one in pod["spec"]["initContainers"]] == ["fetch"]
    environment, worker = env_of(pod), worker_of(pod)
    assert (environment["NCCL_DEBUG"], environment["MINE"]) == ("INFO", "1")
    assert environment["GRPO_MEMBER_NAME"] == "trainer-0"
    assert worker["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "4Gi"}
    assert {"/scratch", "/workspace"} <= {mount["mountPath"] for mount in worker["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["tmp"]["emptyDir"] == {"sizeLimit": "1Gi"}
    assert len(volumes) == len(pod["spec"]["volumes"])


def test_a_volume_of_another_kind_takes_the_place_of_ours() -> None:
    local = {"ephemeral": {"volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteOnce"]}}}}
    pod = pod_of(template(all={"spec": {"volumes": [{"name": "home", **local}]}}))
    assert {"name": "home", **local} in pod["spec"]["volumes"]


@pytest.mark.parametrize(
    ("base", "patch", "merged"),
    [
        ({"a": 1, "b": {"c": 1}}, {"b": {"d": 2}}, {"a": 1, "b": {"c": 1, "d": 2}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"args": ["x"]}, {"args": ["y"]}, {"args": ["y"]}),
        (
            {"env": [{"name": "A", "valueFrom": {"x": 1}}]},
            {"env": [{"name": "A", "value": "1"}]},
            {"env": [{"name": "A", "value": "1"}]},
        ),
        ({}, {"hostAliases": [{"ip": "1.1.1.1"}]}, {"hostAliases": [{"ip": "1.1.1.1"}]}),
    ],
)
def test_merging(base: dict[str, Any], patch: dict[str, Any], merged: dict[str, Any]) -> None:
    assert merge(base, patch) == merged


FORBIDDEN: list[tuple[dict[str, Any], str]] = [
    ({"spec": {"hostNetwork": True}}, "spec.hostNetwork"),
    ({"spec": {"hostPID": True}}, "spec.hostPID"),
    ({"spec": {"hostIPC": True}}, "spec.hostIPC"),
    ({"spec": {"restartPolicy": "Always"}}, "spec.restartPolicy"),
    ({"spec": {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}}, "spec.volumes[0].hostPath"),
    (
        {"spec": {"containers": [{"name": "worker", "securityContext": {"privileged": True}}]}},
        "spec.containers[0].securityContext.privileged",
    ),
    ({"metadata": {"labels": {"grpo.dev/role": "coordinator"}}}, "metadata.labels.grpo.dev/role"),
    (
        {"spec": {"containers": [{"name": "worker", "env": [{"name": "GRPO_JOB_TOKEN", "value": "x"}]}]}},
        "spec.containers[0].env[0] (GRPO_JOB_TOKEN)",
    ),
]


@pytest.mark.parametrize(("patch", "words"), FORBIDDEN, ids=[words for _, words in FORBIDDEN])
def test_what_a_patch_may_not_set_is_refused_here_too(patch: dict[str, Any], words: str) -> None:
    """The document's own validation is by-passed, as by an API server whose CRD is older."""
    problem = build.problem(unchecked(patch), SETTINGS)
    assert words in problem
    assert problem.startswith("runtime.podTemplate")


def unchecked(patch: dict[str, Any]) -> Job:
    job = job_of()
    assert job.spec is not None
    fields = {"workspace": {"claimName": "work"}, "podTemplate": {"all": patch}}
    runtime = Runtime.model_validate(fields)
    return replace(job, spec=job.spec.model_copy(update={"runtime": runtime}))


@pytest.mark.parametrize("path", [[], {}])
def test_a_patch_that_is_no_pod_is_said_not_tried_for_ever(path: Any) -> None:
    job = job_of(template(all={"spec": {"containers": [{"name": "worker", "volumeMounts": [{"mountPath": path}]}]}}))
    assert "runtime.podTemplate" in build.problem(job, SETTINGS)
