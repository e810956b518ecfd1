"""What all pods of a job share: its document, names, token, borders and budget."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from build_jobs import SETTINGS, TOKEN, job_of, pod_of, shared_of

from grpo_operator import build
from grpo_operator.settings import Settings
from grpo_worker.config import load_job


def test_every_child_is_owned_by_the_job_and_carries_its_uid() -> None:
    children = build.shared(job_of(), SETTINGS, TOKEN)
    assert [child["kind"] for child in children] == [
        "Service",
        "ConfigMap",
        "Secret",
        "NetworkPolicy",
        "PodDisruptionBudget",
    ]
    for child in children:
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("uid-1", True, True)
        assert child["metadata"]["labels"]["grpo.dev/job-uid"] == "uid-1"
        assert child["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "grpo-operator"
        assert child["metadata"]["namespace"] == "team"
        assert "finalizers" not in child["metadata"]


def test_the_pods_read_the_document_with_its_preset_resolved_and_its_ports(tmp_path: Path) -> None:
    config = shared_of("ConfigMap", {"algorithm": {"preset": "DAPO"}, "network": {"trainerPort": 9000}})
    file = tmp_path / "job.yaml"
    file.write_text(config["data"]["job.yaml"])
    spec = load_job(file).spec
    assert spec.actor.clip_ratio_high == 0.28
    network = spec.network
    assert (network.coordinator_port, network.trainer_port, network.weight_sync_port) == (7600, 9000, 7602)
    assert (network.rendezvous_port, network.rollout_port) == (7603, 7604)
    assert config["immutable"] is True
    assert config["metadata"]["name"] == build.config_map_name(
        job_of({"algorithm": {"preset": "DAPO"}, "network": {"trainerPort": 9000}})
    )


GPU_LIMIT = "nvidia.com/gpu"


@pytest.mark.parametrize(
    ("spec", "device"),
    [
        ({}, "cuda"),
        ({"runtime": {"device": "cpu"}}, "cpu"),
        ({"placement": "Colocated"}, "cuda"),
        ({"runtime": {"resources": {"trainer": {"limits": {GPU_LIMIT: 0}}}}}, "auto"),
        ({"placement": "Colocated", "runtime": {"resources": {"trainer": {"limits": {GPU_LIMIT: "0"}}}}}, "auto"),
    ],
    ids=str,
)
def test_pods_that_are_given_gpus_are_told_to_use_them(tmp_path: Path, spec: dict[str, Any], device: str) -> None:
    (tmp_path / "job.yaml").write_text(shared_of("ConfigMap", spec)["data"]["job.yaml"])
    assert load_job(tmp_path / "job.yaml").spec.runtime.device == device


def test_no_value_of_a_variable_is_in_a_shared_object() -> None:
    template = {"all": {"spec": {"containers": [{"name": "worker", "env": [{"name": "B", "value": "sesame-2"}]}]}}}
    spec = {"runtime": {"env": [{"name": "A", "value": "sesame-1"}], "podTemplate": template}}
    assert "name: A" in shared_of("ConfigMap", spec)["data"]["job.yaml"]
    assert "sesame" not in json.dumps(build.shared(job_of(spec), SETTINGS, TOKEN))
    pod = json.dumps(pod_of(spec))
    assert "sesame-1" in pod and "sesame-2" in pod


@pytest.mark.parametrize(
    "change",
    [
        {"suspend": True},
        {"activeDeadlineSeconds": 5},
        {"ttlSecondsAfterFinished": 5},
        {"rollout": {"maxReplicas": 9}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_no_process_reads_makes_no_new_config_map(change: dict[str, Any]) -> None:
    assert build.config_map_name(job_of(change)) == build.config_map_name(job_of())


def test_what_a_process_reads_makes_a_new_config_map() -> None:
    assert build.config_map_name(job_of({"rollout": {"replicas": 2}})) != build.config_map_name(job_of())


def test_a_text_that_looks_like_a_number_stays_a_text(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(shared_of("ConfigMap", {"model": {"path": "demo/model", "revision": "1e10"}})["data"]["job.yaml"])
    assert load_job(file).spec.model.revision == "1e10"


def test_names_resolve_before_pods_are_ready() -> None:
    spec = shared_of("Service")["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    assert spec["selector"] == {"grpo.dev/job-uid": "uid-1"}
    assert {port["name"]: port["port"] for port in spec["ports"]} == {
        "coordinator": 7600, "trainer": 7601, "weight-sync": 7602, "rendezvous": 7603, "rollout": 7604,
    }  # fmt: skip


COLOCATED = {"placement": "Colocated", "trainer": {"nodes": 2, "gpusPerNode": 4}, "rollout": {"tensorParallelSize": 2}}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (COLOCATED, {7600: "coordinator", 7601: "trainer", 7602: "weight-sync", 7603: "rendezvous", 7604: "rollout", 7605: "rollout-1"}),
        ({"network": {"coordinatorPort": 7601}}, {7601: "coordinator", 7602: "weight-sync", 7603: "rendezvous", 7604: "rollout"}),
        ({"network": {"coordinatorPort": 9000, "rolloutPort": 9000}}, {9000: "coordinator", 7601: "trainer", 7602: "weight-sync", 7603: "rendezvous"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_service_has_each_port_and_each_name_once(spec: dict[str, Any], expected: dict[int, str]) -> None:
    ports = shared_of("Service", spec)["spec"]["ports"]
    assert {port["port"]: port["name"] for port in ports} == expected
    assert len(ports) == len(expected) == len({port["name"] for port in ports})


def test_the_secret_holds_the_token() -> None:
    secret = shared_of("Secret")
    assert secret["metadata"]["name"] == "demo-token"
    assert base64.b64decode(secret["data"]["token"]).decode() == TOKEN


def test_only_the_jobs_own_pods_and_the_operator_may_connect() -> None:
    spec = shared_of("NetworkPolicy")["spec"]
    assert spec["podSelector"] == {"matchLabels": {"grpo.dev/job-uid": "uid-1"}}
    assert spec["policyTypes"] == ["Ingress"]
    own, operator = spec["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": {"grpo.dev/job-uid": "uid-1"}}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 7600}]
    assert operator["from"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "grpo-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "grpo-operator"}},
        }
    ]


def test_scrapers_reach_the_ports_that_serve_metrics() -> None:
    settings = Settings(worker_image="x", metrics_namespaces=("monitoring",))
    *_, scrape = shared_of("NetworkPolicy", settings=settings)["spec"]["ingress"]
    assert [port["port"] for port in scrape["ports"]] == [7600, 7601, 7604]
    *_, of_nodes = shared_of("NetworkPolicy", COLOCATED, settings)["spec"]["ingress"]
    assert [port["port"] for port in of_nodes["ports"]] == [7600, 7601, 7604, 7605]
    (values,) = [one["values"] for one in scrape["from"][0]["namespaceSelector"]["matchExpressions"]]
    assert values == ["monitoring"]


def test_no_pod_that_holds_state_may_be_evicted() -> None:
    spec = shared_of("PodDisruptionBudget", {"trainer": {"nodes": 4}})["spec"]
    assert spec["minAvailable"] == 5
    assert spec["selector"]["matchExpressions"][0]["values"] == ["coordinator", "trainer"]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ({}, (7601, 7602, 7603)),
        ({"trainerPort": 7602}, (7602, 7603, 7604)),
        ({"rendezvousPort": 7601}, (7602, 7603, 7601)),
    ],
)
def test_ports_of_one_pod_never_clash(network: dict[str, int], expected: tuple[int, int, int]) -> None:
    ports = build.ports_of(job_of({"network": network}))
    assert (ports.trainer, ports.weight_sync, ports.rendezvous) == expected


def test_a_job_without_workspace_is_refused_with_what_to_do() -> None:
    assert "Set runtime.workspace.claimName" in build.problem(job_of(workspace=False), SETTINGS)


def test_a_sound_job_has_no_problem() -> None:
    assert build.problem(job_of(), SETTINGS) == ""
