"""What each field of the document makes of a pod."""

from dataclasses import replace
from typing import Any

import pytest
from build_jobs import SETTINGS, env_of, job_of, pod_of, worker_of

from grpo_operator import build
from grpo_operator.labels import Role
from grpo_worker.config.status import Checkpoints, ExcludedNode, GRPOJobStatus


def test_names_labels_and_command_follow_the_role() -> None:
    pod = pod_of(role=Role.ROLLOUT, index=3, status=GRPOJobStatus(attempt=2))
    metadata, spec, worker = pod["metadata"], pod["spec"], worker_of(pod)
    assert (metadata["name"], spec["hostname"], spec["subdomain"]) == ("demo-rollout-3", "rollout-3", "demo")
    labels = metadata["labels"]
    assert (labels["grpo.dev/role"], labels["grpo.dev/index"], labels["grpo.dev/attempt"]) == ("rollout", "3", "2")
    assert build.config_map_name(job_of()) == f"demo-{labels['grpo.dev/config']}"
    assert worker["command"] == ["grpo-worker", "rollout", "--job", "/etc/grpo/job.yaml"]
    assert spec["restartPolicy"] == "Never"


@pytest.mark.parametrize("role", list(Role))
def test_a_pod_is_restricted_and_holds_no_credentials(role: Role) -> None:
    spec = pod_of(role=role)["spec"]
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert worker_of({"spec": spec})["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize(
    ("role", "index", "path"),
    [
        (Role.COORDINATOR, 0, "/healthz"),
        (Role.TRAINER, 0, "/readyz"),
        (Role.TRAINER, 1, None),
        (Role.ROLLOUT, 1, "/readyz"),
    ],
)
def test_who_serves_is_probed(role: Role, index: int, path: str | None) -> None:
    worker = worker_of(pod_of({"trainer": {"nodes": 2}}, role, index))
    probe = worker.get("readinessProbe", {}).get("httpGet", {})
    assert probe.get("path") == path
    assert [probe["port"]] == list(ports_of_worker({"spec": {"containers": [worker]}}))[:1] if path else not probe
    assert not {"livenessProbe", "startupProbe", "lifecycle"} & set(worker)


def test_the_last_word_is_the_termination_message() -> None:
    worker = worker_of(pod_of())
    assert worker["terminationMessagePath"] == "/dev/termination-log"
    assert worker["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert env_of(pod_of())["GRPO_TERMINATION_LOG"] == "/dev/termination-log"


@pytest.mark.parametrize(
    ("role", "index", "expected"),
    [
        (Role.COORDINATOR, 0, {"GRPO_MEMBER_NAME": "coordinator", "GRPO_COORDINATOR_PORT": "7600"}),
        (
            Role.TRAINER,
            1,
            {
                "GRPO_MEMBER_NAME": "trainer-1", "NODE_RANK": "1", "MASTER_PORT": "7603",
                "MASTER_ADDR": "trainer-0.demo.team.svc", "NCCL_DEBUG": "WARN",
            },
        ),
        (Role.ROLLOUT, 2, {"GRPO_MEMBER_NAME": "rollout-2", "GRPO_REPLICA_INDEX": "2", "GRPO_ROLLOUT_PORT": "7604"}),
    ],
)  # fmt: skip
def test_a_process_is_told_what_it_is(role: Role, index: int, expected: dict[str, str]) -> None:
    environment = env_of(pod_of({"trainer": {"nodes": 2}}, role, index))
    assert expected.items() <= environment.items()
    assert environment["GRPO_COORDINATOR_URL"] == "http://coordinator.demo.team.svc:7600"
    assert environment["GRPO_RUN_DIR"] == "/workspace/runs/demo"
    assert environment["GRPO_LISTEN_HOST"] == "0.0.0.0"
    assert environment["GRPO_ADVERTISED_HOST"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert environment["GRPO_JOB_TOKEN"] == {"secretKeyRef": {"name": "demo-token", "key": "token"}}


@pytest.mark.parametrize("role", list(Role))
def test_nothing_is_written_outside_volumes(role: Role) -> None:
    """Each variable that names a directory points below a mount that can be written."""
    pod = pod_of(role=role)
    writable = [mount["mountPath"] for mount in worker_of(pod)["volumeMounts"] if not mount.get("readOnly")]
    paths = {name: value for name, value in env_of(pod).items() if isinstance(value, str) and value.startswith("/")}
    assert {"HOME", "TMPDIR", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"} <= set(paths)
    for name, path in paths.items():
        assert any(path.startswith(mount) for mount in writable) or path == "/dev/termination-log", name


def test_a_persons_variables_win_over_our_defaults() -> None:
    variables = [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "HF_HOME", "value": "/cache"}]
    assert {"NCCL_DEBUG": "INFO", "HF_HOME": "/cache"}.items() <= env_of(pod_of({"runtime": runtime(env=variables)})).items()  # fmt: skip


def test_secrets_become_variables() -> None:
    source = {"secretKeyRef": {"name": "hub", "key": "token"}}
    sources = [{"secretRef": {"name": "all"}}, {"configMapRef": {"name": "settings"}}]
    pod = pod_of({"runtime": runtime(env=[{"name": "HF_TOKEN", "valueFrom": source}], envFrom=sources)})
    assert env_of(pod)["HF_TOKEN"] == source
    assert worker_of(pod)["envFrom"] == sources


@pytest.mark.parametrize("role", list(Role))
def test_a_job_cannot_set_what_tells_its_process_who_it_is(role: Role) -> None:
    """Whatever differs between two pods or two jobs: the document that sets it is refused."""
    spec = {"trainer": {"nodes": 2}}
    mine, other = env_of(pod_of(spec, role, 1, OWN)), env_of(pod_of(spec, role, 0, OWN))
    theirs = {name for name, value in mine.items() if value != other.get(name)}
    theirs |= {name for name in mine if name.startswith(("GRPO_", "MASTER_"))}
    assert {"GRPO_MEMBER_NAME", "GRPO_JOB_TOKEN"} <= theirs
    for name in theirs:
        job = job_of({"runtime": runtime(env=[{"name": name, "value": "x"}])}, check=False)
        assert "sets a variable that `grpo run` and the operator set" in job.invalid, name


OWN = GRPOJobStatus(
    attempt=1, start_time="2026-01-01T10:00:00Z", checkpoints=Checkpoints(last_step=4, time="2026-01-01T11:00:00Z")
)
OLDER = GRPOJobStatus(
    attempt=1, start_time="2026-01-01T10:00:00Z", checkpoints=Checkpoints(last_step=4, time="2026-01-01T09:00:00Z")
)


@pytest.mark.parametrize(
    ("status", "resumes"),
    [(GRPOJobStatus(), False), (GRPOJobStatus(attempt=1), False), (OLDER, False), (OWN, True)],
    ids=["first attempt", "nothing saved yet", "found an older run's", "saved its own"],
)
def test_a_restart_goes_on_from_the_jobs_own_checkpoint(status: GRPOJobStatus, resumes: bool) -> None:
    assert (env_of(pod_of(role=Role.COORDINATOR, status=status)).get("GRPO_RESUME") == "auto") is resumes
    assert "GRPO_RESUME" not in env_of(pod_of(status=status))


@pytest.mark.parametrize(
    ("spec", "role", "threads"),
    [
        ({}, Role.COORDINATOR, "1"),
        ({}, Role.TRAINER, None),
        ({"runtime": {"cpuThreads": 3}}, Role.TRAINER, "3"),
        ({"runtime": {"resources": {"trainer": {"limits": {"cpu": 4}}}}, "trainer": {"gpusPerNode": 2}}, Role.TRAINER, "2"),
        ({"runtime": {"resources": {"rollout": {"requests": {"cpu": "1500m"}}}}}, Role.ROLLOUT, "1"),
        ({"runtime": {"resources": {"rollout": {"requests": {"cpu": "250m"}}}}}, Role.ROLLOUT, "1"),
    ],
)  # fmt: skip
def test_threads_follow_the_cores_of_the_pod(spec: dict[str, Any], role: Role, threads: str | None) -> None:
    environment = env_of(pod_of({**spec, "runtime": runtime(**spec.get("runtime", {}))}, role))
    assert environment.get("OMP_NUM_THREADS") == threads
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    ("device", "role", "gpus"),
    [
        ("auto", Role.TRAINER, "8"),
        ("cuda", Role.ROLLOUT, "2"),
        ("auto", Role.COORDINATOR, None),
        ("cpu", Role.TRAINER, None),
    ],
)
def test_gpus_follow_the_layout(device: str, role: Role, gpus: str | None) -> None:
    spec = {
        "runtime": runtime(device=device), "trainer": {"gpusPerNode": 8}, "rollout": {"tensorParallelSize": 2},
    }  # fmt: skip
    assert worker_of(pod_of(spec, role))["resources"].get("limits", {}).get("nvidia.com/gpu") == gpus


def test_resources_are_those_of_the_role() -> None:
    asked = {"trainer": {"requests": {"cpu": 8, "memory": "64Gi"}, "limits": {"memory": "128Gi"}}}
    pod = pod_of({"runtime": runtime(resources=asked, device="cpu")})
    assert worker_of(pod)["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi"},
        "limits": {"memory": "128Gi"},
    }
    assert worker_of(pod_of({"runtime": runtime(resources=asked, device="cpu")}, Role.ROLLOUT))["resources"] == {}


def test_rdma_asks_for_devices_and_the_right_to_pin_memory() -> None:
    network = {"network": {"rdma": {"resource": "rdma/hca", "count": 4}, "socketInterface": "eth1"}}
    for role in (Role.TRAINER, Role.ROLLOUT):
        worker, environment = worker_of(pod_of(network, role)), env_of(pod_of(network, role))
        assert worker["resources"]["limits"]["rdma/hca"] == "4"
        assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert (environment["NCCL_SOCKET_IFNAME"], environment["GLOO_SOCKET_IFNAME"]) == ("eth1", "eth1")
    worker = worker_of(pod_of(network, Role.COORDINATOR))
    assert (worker["resources"], worker["securityContext"]["capabilities"]) == ({}, {"drop": ["ALL"]})


def test_image_pulling_and_grace_are_the_documents() -> None:
    fields = {
        "image": "example/mine:2", "imagePullPolicy": "Always", "imagePullSecrets": ["registry"],
        "terminationGracePeriodSeconds": 30,
    }  # fmt: skip
    pod = pod_of({"runtime": runtime(**fields)})
    worker = worker_of(pod)
    assert (worker["image"], worker["imagePullPolicy"]) == ("example/mine:2", "Always")
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["spec"]["terminationGracePeriodSeconds"] == 30
    assert worker_of(pod_of())["image"] == "registry.example/grpo-worker:1"


def test_volumes_are_the_workspace_the_document_scratch_and_the_jobs_own() -> None:
    extra = [{"name": "data", "claimName": "sets", "mountPath": "/data", "subPath": "math", "readOnly": False}]
    pod = pod_of({"runtime": {"workspace": {"claimName": "work", "subPath": "me"}, "volumes": extra, "shmSize": "1Gi"}})
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in worker_of(pod)["volumeMounts"]}
    assert volumes["workspace"]["persistentVolumeClaim"] == {"claimName": "work"}
    assert mounts["/workspace"]["subPath"] == "me"
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "sets"}
    assert mounts["/data"] == {"name": "data", "mountPath": "/data", "subPath": "math"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert set(mounts) == {"/workspace", "/etc/grpo", "/home/grpo", "/tmp", "/dev/shm", "/data"}
    assert worker_of(pod)["workingDir"] == "/workspace"


def test_a_volume_that_is_mounted_where_another_is_is_refused() -> None:
    extra = [{"name": "data", "claimName": "sets", "mountPath": "/workspace"}]
    job = job_of({"runtime": runtime(volumes=extra)}, check=False)
    assert "/workspace" in (job.invalid or build.problem(job, SETTINGS))


def test_pods_leave_dead_nodes_after_a_minute() -> None:
    tolerations = pod_of()["spec"]["tolerations"]
    assert {(one["key"], one["effect"], one["tolerationSeconds"]) for one in tolerations} == {
        ("node.kubernetes.io/not-ready", "NoExecute", 60),
        ("node.kubernetes.io/unreachable", "NoExecute", 60),
    }


def test_scheduling_is_passed_on() -> None:
    mine = {
        "key": "node.kubernetes.io/unreachable",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": 5,
    }
    wanted = {
        "nodeSelector": {"pool": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}, mine],
        "priorityClassName": "training",
        "schedulerName": "other",
    }
    spec = pod_of({"scheduling": wanted})["spec"]
    assert spec["nodeSelector"] == {"pool": "h100"}
    assert (spec["priorityClassName"], spec["schedulerName"]) == ("training", "other")
    keys = [one["key"] for one in spec["tolerations"]]
    assert keys == ["gpu", "node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"]


def test_trainer_nodes_are_different_nodes() -> None:
    affinity = pod_of({"trainer": {"nodes": 2}})["spec"]["affinity"]["podAntiAffinity"]
    (rule,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert rule["labelSelector"]["matchLabels"] == {"grpo.dev/job-uid": "uid-1", "grpo.dev/role": "trainer"}
    assert "affinity" not in pod_of()["spec"]
    assert "affinity" not in pod_of({"trainer": {"nodes": 2}}, Role.ROLLOUT)["spec"]


EXCLUDED = GRPOJobStatus(excluded_nodes=[ExcludedNode(name="b"), ExcludedNode(name="a")])
AWAY = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in ("a", "b")]


def test_pods_with_devices_keep_away_from_excluded_nodes() -> None:
    for role in (Role.TRAINER, Role.ROLLOUT):
        affinity = pod_of(role=role, status=EXCLUDED)["spec"]["affinity"]["nodeAffinity"]
        required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
        assert required == {"nodeSelectorTerms": [{"matchFields": AWAY}]}
    assert "affinity" not in pod_of(role=Role.COORDINATOR, status=EXCLUDED)["spec"]


def test_each_alternative_of_a_persons_affinity_keeps_away_from_excluded_nodes() -> None:
    terms = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]} for zone in ("x", "y")]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    template = {"trainer": {"spec": {"affinity": {"nodeAffinity": required}}}}
    spec = pod_of({"runtime": runtime(podTemplate=template)}, status=EXCLUDED)["spec"]
    found = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert found == [{**term, "matchFields": AWAY} for term in terms]


def runtime(**fields: Any) -> dict[str, Any]:
    return {"workspace": {"claimName": "work"}, **fields}


def test_a_colocated_node_is_one_container_with_the_nodes_gpus_and_a_port_for_each_of_its_engines() -> None:
    colocated = {
        "placement": "Colocated",
        "trainer": {"nodes": 2, "gpusPerNode": 8},
        "rollout": {"tensorParallelSize": 2},
        "network": {"weightSyncPort": 7606},
    }
    pod = pod_of(colocated, Role.TRAINER, 1)
    worker, variables = worker_of(pod), env_of(pod)
    assert worker["command"] == ["grpo-worker", "node", "--job", "/etc/grpo/job.yaml"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "8"
    engines = {"rollout": 7607, "rollout-1": 7608, "rollout-2": 7609, "rollout-3": 7610}
    assert ports_of_worker(pod) == engines
    first = {"trainer": 7601, "weight-sync": 7606, "rendezvous": 7603}
    assert ports_of_worker(pod_of(colocated, Role.TRAINER, 0)) == first | engines
    assert (variables["GRPO_ROLLOUT_PORT"], variables["NODE_RANK"], variables["GRPO_DEVICE_COUNT"]) == (
        "7607",
        "1",
        "16",
    )
    assert worker_of(pod_of(colocated, Role.COORDINATOR))["command"][1] == "coordinator"
    apart = pod_of({"trainer": {"gpusPerNode": 8}})
    assert worker_of(apart)["command"][1] == "trainer"
    assert "GRPO_ROLLOUT_PORT" not in env_of(apart)
    assert list(ports_of_worker(apart)) == ["trainer", "weight-sync", "rendezvous"]


def ports_of_worker(pod: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in worker_of(pod)["ports"]}


@pytest.mark.parametrize(
    ("role", "index", "port"),
    [(Role.COORDINATOR, 0, "7600"), (Role.TRAINER, 0, "7601"), (Role.ROLLOUT, 3, "7604"), (Role.TRAINER, 1, None)],
)
def test_scrapers_are_told_of_what_serves_and_of_nothing_else(role: Role, index: int, port: str | None) -> None:
    """Of several trainer nodes the first alone has a server; a target that never answers would look like a failure."""
    job = job_of({"trainer": {"nodes": 2}})
    settings = replace(SETTINGS, scrape_annotations=True)
    told = build.pod(job, role, index, GRPOJobStatus(), settings)["metadata"]["annotations"]
    expected = {"prometheus.io/scrape": "true", "prometheus.io/port": port, "prometheus.io/path": "/metrics"}
    assert {key: value for key, value in told.items() if key.startswith("prometheus.io/")} == (expected if port else {})
    plain = build.pod(job, role, index, GRPOJobStatus(), SETTINGS)["metadata"]["annotations"]
    assert not [key for key in plain if key.startswith("prometheus.io/")]
    served = ports_of_worker(build.pod(job, role, index, GRPOJobStatus(), SETTINGS))
    assert (role.value in served) == (port is not None)
