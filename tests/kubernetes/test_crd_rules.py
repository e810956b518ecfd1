"""A real API server refuses what `grpo validate` refuses, with the field and what to do, and takes what it takes."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from e2e.cluster import ClusterError, ControlPlane
from job_documents import BAD_FIELDS, CONTRADICTIONS, DOCUMENT, GOOD
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from pydantic import BaseModel

from grpo_worker.config import job_from_document, load_job, parse_yaml, resolved_document
from grpo_worker.config.crd import crd
from grpo_worker.config.load import apply_override
from grpo_worker.config.presets import PRESETS
from grpo_worker.config.status import Checkpoints, GRPOJobStatus, Progress, RolloutScale, Summary

ROOT = Path(__file__).parents[2]
CRD = ROOT / "crds" / "grpojobs.grpo.dev.yaml"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
ENDPOINT = ("grpo.dev", "v1alpha1")
NOW = "2026-01-02T03:04:05Z"

# What the API server takes although `grpo validate` does not, and why that does no harm.
TAKEN = {"actor=": "null is an absent section"}
# JSON has no such numbers, and kubectl sends 1e3 as 1000.
NOT_JSON = {"actor.optim.lr=.inf", "actor.optim.lr=.nan", "data.trainBatchSize=1e3"}


class Jobs:
    """The API of GRPOJobs in one namespace; refusals are returned as text."""

    def __init__(self, api: client.CustomObjectsApi, namespace: str) -> None:
        self._api, self.namespace = api, namespace

    def create(self, document: dict[str, Any], *, dry_run: bool = True) -> dict[str, Any]:
        options = {"dry_run": "All"} if dry_run else {}
        return self._api.create_namespaced_custom_object(
            *ENDPOINT, self.namespace, "grpojobs", document, field_validation="Strict", **options
        )

    def refusal(self, document: dict[str, Any]) -> str:
        with pytest.raises(ApiException) as caught:
            self.create(document)
        assert caught.value.status in (400, 422), caught.value.body
        return str(json.loads(caught.value.body)["message"])

    def replace(self, document: dict[str, Any]) -> dict[str, Any]:
        """A dry run."""
        name = document["metadata"]["name"]
        return self._api.replace_namespaced_custom_object(
            *ENDPOINT, self.namespace, "grpojobs", name, document, dry_run="All", field_validation="Strict"
        )

    def write_status(self, name: str, status: dict[str, Any]) -> dict[str, Any]:
        written = self._api.patch_namespaced_custom_object_status(
            *ENDPOINT, self.namespace, "grpojobs", name, {"status": status}, field_validation="Strict"
        )
        return dict(written["status"])


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane) -> ControlPlane:
    control_plane.apply(CRD)
    control_plane.wait_for_crd("grpojobs.grpo.dev")
    return control_plane


@pytest.fixture(scope="module")
def jobs(cluster: ControlPlane) -> Iterator[Jobs]:
    namespace = cluster.create_namespace()
    with config.new_client_from_config(config_file=str(cluster.kubeconfig)) as api:
        yield Jobs(client.CustomObjectsApi(api), namespace)
    cluster.delete_namespace(namespace)


def document(*overrides: str) -> dict[str, Any]:
    """The sound document with overrides, as a person would have written it."""
    raw = parse_yaml(DOCUMENT, "test")
    for text in overrides:
        apply_override(raw, text)
    return dict(raw)


# Refusals.


@pytest.mark.parametrize(
    ("text", "path"),
    [(text, path) for text, path, _ in BAD_FIELDS if text not in NOT_JSON | TAKEN.keys()],
    ids=[text for text, _, _ in BAD_FIELDS if text not in NOT_JSON | TAKEN.keys()],
)
def test_a_bad_field_is_refused_by_its_path(jobs: Jobs, text: str, path: str) -> None:
    message = jobs.refusal(document(text))
    shown = path.rpartition(".")[2] if path.startswith("metadata.labels") else path
    assert shown in message or shown.replace(".nvidia.com", "[nvidia.com") in message, message


@pytest.mark.parametrize("text", TAKEN)
def test_what_only_grpo_validate_refuses_is_known(jobs: Jobs, text: str) -> None:
    jobs.create(document(text))


@pytest.mark.parametrize(("overrides", "path", "words"), CONTRADICTIONS, ids=[" ".join(c[0]) for c in CONTRADICTIONS])
def test_a_contradiction_names_the_field_and_what_to_do(
    jobs: Jobs, overrides: list[str], path: str, words: str
) -> None:
    message = jobs.refusal(document(*overrides))
    assert f"spec.{path}" in message
    assert words in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runtime.podTemplate.all.spec.hostNetwork=true", "hostNetwork is refused"),
        ("runtime.podTemplate.all.spec.hostIPC=true", "hostIPC is refused"),
        ("runtime.podTemplate.all.spec.volumes=[{name: a, hostPath: {path: /}}]", "Use a claim (runtime.volumes)"),
        (
            "runtime.podTemplate.all.spec.initContainers=[{name: a, securityContext: {allowPrivilegeEscalation: true}}]",
            "initContainers: privileged and allowPrivilegeEscalation are refused",
        ),
        ("runtime.podTemplate.all.spec.containers=[{image: a}]", "containers[0].name: Required value"),
        ("runtime.podTemplate.all.spec.ephemeralContainers=[{name: a}]", "belongs to the operator"),
        ("runtime.podTemplate.all.metadata.labels={app.kubernetes.io/name: a}", "belong to the operator"),
    ],
)
def test_a_pod_template_cannot_reach_the_host_nor_what_the_operator_owns(jobs: Jobs, text: str, words: str) -> None:
    message = jobs.refusal(document(text))
    assert "spec.runtime.podTemplate.all" in message
    assert words in message, message


def test_kubectl_users_are_told_of_a_job_without_a_spec_or_a_model(jobs: Jobs) -> None:
    raw = document()
    assert "spec.model: Required value" in jobs.refusal({**raw, "spec": {"data": raw["spec"]["data"]}})
    assert "spec: Required value" in jobs.refusal({key: value for key, value in raw.items() if key != "spec"})


# What is taken.


@pytest.mark.parametrize("overrides", GOOD, ids=[" ".join(case) for case in GOOD])
def test_a_sound_document_means_the_same_on_both_sides(jobs: Jobs, overrides: list[str]) -> None:
    raw = document(*overrides)
    assert_same(jobs.create(raw), raw)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_still_wins_after_the_defaults_of_the_api_server(jobs: Jobs, name: str) -> None:
    raw = document(f"algorithm.preset={name}")
    assert_same(jobs.create(raw), raw)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_means_the_same_on_both_sides(cluster: ControlPlane, jobs: Jobs, path: Path) -> None:
    """Through kubectl and its YAML."""
    words = ("apply", "--dry-run=server", "-n", jobs.namespace, "-o", "json", "-f")
    assert_same(json.loads(cluster.kubectl(*words, str(path))), parse_yaml(path.read_text(), str(path)))


def assert_same(stored: dict[str, Any], written: dict[str, Any]) -> None:
    ours, theirs = resolved_document(job_from_document(written)), resolved_document(job_from_document(stored))
    assert theirs["spec"] == ours["spec"]


def test_a_document_written_out_by_grpo_validate_is_taken_by_kubectl(
    cluster: ControlPlane, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from grpo_worker.cli.main import main

    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main(["validate", str(EXAMPLES[-1])]))
    assert not caught.value.code
    said, _, text = capsys.readouterr().out.partition("\n")
    assert said == "valid"
    cluster.kubectl("apply", "--dry-run=server", "-n", jobs.namespace, "-f", "-", input_text=text)


def test_an_unquoted_n_is_explained(cluster: ControlPlane, jobs: Jobs) -> None:
    """kubectl reads YAML 1.1, where a plain `n` is false."""
    with pytest.raises(ClusterError, match='Write "n", in quotes'):
        cluster.kubectl(
            "apply", "--dry-run=server", "-n", jobs.namespace, "-f", "-", input_text=DOCUMENT + "  rollout:\n    n: 8\n"
        )
    quoted = DOCUMENT + '  rollout:\n    "n": 8\n'
    shown = cluster.kubectl(
        "apply", "--dry-run=server", "-n", jobs.namespace, "-o", "json", "-f", "-", input_text=quoted
    )
    assert json.loads(shown)["spec"]["rollout"]["n"] == 8


def test_kubectl_shows_the_words_of_a_refusal(cluster: ControlPlane, jobs: Jobs) -> None:
    text = json.dumps(document("data.trainBatchSize=100", "actor.ppoMiniBatchSize=64"))
    with pytest.raises(
        ClusterError, match=r"actor.ppoMiniBatchSize does not divide data.trainBatchSize. Choose a divisor"
    ):
        cluster.kubectl("apply", "--dry-run=server", "-n", jobs.namespace, "-f", "-", input_text=text)


# Changes of a job that exists.

SPEC: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
# Where another value cannot be made from the schema alone.
OTHER: dict[str, Any] = {
    "algorithm.advantageEstimator": "mine:advantages",
    "actor.lossMode": "mine:loss",
    "data.dataset": "mine:rows",
    "reward.function": "mine:reward",
    "reward.parts": [{"name": "other", "function": "math"}],
    "rollout.agent": "mine:agent",
    "runtime.workspace": {"claimName": "other"},
    "runtime.shmSize": "1Gi",
    "runtime.env": [{"name": "OTHER", "value": "x"}],
    "runtime.envFrom": [{"secretRef": {"name": "other"}}],
    "runtime.volumes": [{"name": "other", "claimName": "other", "mountPath": "/other"}],
    "runtime.resources.coordinator": {"limits": {"cpu": 1}},
    "runtime.resources.trainer": {"limits": {"cpu": 1}},
    "runtime.resources.rollout": {"limits": {"cpu": 1}},
    "runtime.podTemplate.all": {"spec": {"dnsPolicy": "None"}},
    "runtime.podTemplate.coordinator": {"spec": {"dnsPolicy": "None"}},
    "runtime.podTemplate.trainer": {"spec": {"containers": [{"name": "worker", "tty": True}]}},
    "runtime.podTemplate.rollout": {"metadata": {"labels": {"other": "x"}}},
    "network.rdma": {"resource": "rdma/other"},
    "failurePolicy.rules": [{"action": "FailJob", "exitCodes": [7]}],
    "scheduling.tolerations": [{"operator": "Exists"}],
    "algorithm.rolloutCorrection.rolloutRs": ["seq_max_k2"],
    "actor.optim.betas": [0.5, 0.6],
}
CHANGES = {
    "suspend": True,
    "ttlSecondsAfterFinished": 5,
    "activeDeadlineSeconds": 5,
    "rollout.replicas": 7,
    "rollout.minReplicas": 1,
    "rollout.maxReplicas": 9,
}


def held_fields(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field with a rule that it may not change."""
    for rule in node.get("x-kubernetes-validations", ()):
        if "oldSelf" in rule["rule"]:
            key = rule["fieldPath"].lstrip(".")
            yield f"{path}.{key}".lstrip("."), node["properties"][key]
    for key, child in node.get("properties", {}).items():
        yield from held_fields(child, f"{path}.{key}".lstrip("."))


HELD = dict(held_fields(SPEC))


def other_value(path: str, node: dict[str, Any], value: Any) -> Any:
    """A value that the field may have, and not the one that it has."""
    if path in OTHER:
        return OTHER[path]
    if "enum" in node:
        return next(option for option in node["enum"] if option != value)
    kind = node.get("type")
    if kind == "boolean":
        return not value
    if kind == "integer":
        return 2 * (value or 4) if (value or 4) > 0 else 5
    if kind == "number":
        return (value or 0.5) / 2
    if kind == "array":
        return [other_value("", node["items"], None)]
    return {"other": "x"} if kind == "object" else "other"


def value_at(spec: dict[str, Any], path: str) -> Any:
    node: Any = spec
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def put(spec: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        spec = spec.setdefault(key, {})
    if value is None:
        spec.pop(last, None)
    else:
        spec[last] = value


def rich_document() -> dict[str, Any]:
    """The large example, and what it leaves out."""
    rich = parse_yaml(EXAMPLES[-1].read_text(), "example")
    for path in ("data.systemPrompt", "network.socketInterface", *OTHER):
        if value_at(rich["spec"], path) is None and path not in ("data.dataset", "rollout.agent", "reward.parts"):
            put(rich["spec"], path, copy.deepcopy(OTHER.get(path, "some")))
    return dict(rich)


RICH = rich_document()


def can_be_taken_away(path: str) -> bool:
    value = value_at(RICH["spec"], path)
    return value is not None and value != HELD[path].get("default") and path != "model.path"


@pytest.fixture(scope="module")
def existing(jobs: Jobs) -> dict[str, dict[str, Any]]:
    """A job with as little as possible, and one with nearly everything set."""
    return {"small": jobs.create(document(), dry_run=False), "rich": jobs.create(RICH, dry_run=False)}


@pytest.mark.parametrize("path", HELD)
def test_a_field_cannot_be_changed_or_added(jobs: Jobs, existing: dict[str, dict[str, Any]], path: str) -> None:
    changed = copy.deepcopy(existing["small"])
    put(changed["spec"], path, other_value(path, HELD[path], value_at(changed["spec"], path)))
    assert_immutable(jobs, changed, path)


@pytest.mark.parametrize("path", [path for path in HELD if can_be_taken_away(path)])
def test_a_field_cannot_be_taken_away(jobs: Jobs, existing: dict[str, dict[str, Any]], path: str) -> None:
    changed = copy.deepcopy(existing["rich"])
    put(changed["spec"], path, None)
    assert_immutable(jobs, changed, path)


def assert_immutable(jobs: Jobs, changed: dict[str, Any], path: str) -> None:
    with pytest.raises(ApiException) as caught:
        jobs.replace(changed)
    message = str(json.loads(caught.value.body)["message"])
    assert f"spec.{path} is immutable: create a new job" in message, message


@pytest.mark.parametrize("path", CHANGES)
def test_what_may_change_can_be_set_and_taken_back(jobs: Jobs, existing: dict[str, dict[str, Any]], path: str) -> None:
    changed = copy.deepcopy(existing["small"])
    put(changed["spec"], path, CHANGES[path])
    assert value_at(jobs.replace(changed)["spec"], path) == CHANGES[path]
    taken_back = copy.deepcopy(existing["rich"])
    if path == "rollout.replicas":
        put(taken_back["spec"], "rollout.minReplicas", None)  # one engine would be too few
    put(taken_back["spec"], path, None)
    jobs.replace(taken_back)


def test_changes_that_contradict_are_refused(jobs: Jobs, existing: dict[str, dict[str, Any]]) -> None:
    changed = copy.deepcopy(existing["rich"])
    put(changed["spec"], "rollout.replicas", 13)
    with pytest.raises(ApiException, match=r"rollout\.maxReplicas is less than rollout\.replicas"):
        jobs.replace(changed)


def test_applying_the_same_file_again_changes_nothing(cluster: ControlPlane, namespace: str) -> None:
    generations = set()
    for _ in range(2):
        cluster.kubectl("apply", "-n", namespace, "-f", str(EXAMPLES[-1]))
        generations.add(cluster.get("grpojob", "-n", namespace)["items"][0]["metadata"]["generation"])
    assert generations == {1}


# kubectl.


def test_kubectl_scale_changes_the_engines_within_their_bounds(cluster: ControlPlane, namespace: str) -> None:
    text = json.dumps(document("rollout.maxReplicas=3", "metadata.name=scaled"))
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input_text=text)
    cluster.kubectl("scale", "-n", namespace, "grpojob/scaled", "--replicas=3")
    assert cluster.get("grpojob", "scaled", "-n", namespace)["spec"]["rollout"]["replicas"] == 3
    with pytest.raises(ClusterError, match=r"rollout\.maxReplicas"):
        cluster.kubectl("scale", "-n", namespace, "grpojob/scaled", "--replicas=4")
    status = GRPOJobStatus(rollout=RolloutScale(replicas=2, selector="grpo.dev/job=scaled,grpo.dev/role=rollout"))
    patch = json.dumps({"status": status.document()})
    cluster.kubectl("patch", "-n", namespace, "grpojob", "scaled", "--subresource=status", "--type=merge", "-p", patch)
    scale = json.loads(
        cluster.kubectl("get", "--raw", f"/apis/grpo.dev/v1alpha1/namespaces/{namespace}/grpojobs/scaled/scale")
    )
    assert scale["spec"]["replicas"] == 3
    assert scale["status"] == {"replicas": 2, "selector": "grpo.dev/job=scaled,grpo.dev/role=rollout"}


def filled(annotation: Any) -> Any:
    """A value of this type with every field below it set."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            whole = kind(**{name: filled(info.annotation) for name, info in kind.model_fields.items()})
            return [whole] if get_origin(annotation) is list else whole
    choices = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) is Annotated:
        return NOW
    if get_origin(annotation) is Literal:
        return choices[0]
    if choices:
        return filled(choices[0])
    return {int: 3, float: 1e-6, str: "text", bool: True}[annotation]


FULL_STATUS: GRPOJobStatus = filled(GRPOJobStatus)


def test_the_whole_status_is_stored_and_nothing_is_pruned(jobs: Jobs) -> None:
    assert FULL_STATUS.document().keys() == {info.alias for info in GRPOJobStatus.model_fields.values()}
    jobs.create(document("metadata.name=kept"), dry_run=False)
    written = jobs.write_status("kept", FULL_STATUS.document())
    assert written == FULL_STATUS.document()
    assert GRPOJobStatus.model_validate(written) == FULL_STATUS


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"phase": "Running"}, 'unknown field "status.phase"'),
        ({"state": "Running"}, "status.state: Unsupported value"),
        ({"conditions": [{"type": "Ready"}]}, "status.conditions[0].status: Required value"),
        ({"conditions": [{"type": "Ready", "status": "True"}] * 2}, "Duplicate value"),
        ({"startTime": "yesterday"}, "status.startTime"),
        ({"progress": {"reward": "0.5"}}, "status.progress.reward"),
    ],
)
def test_a_status_outside_of_its_contract_is_refused(
    jobs: Jobs, existing: dict[str, dict[str, Any]], status: dict[str, Any], words: str
) -> None:
    with pytest.raises(ApiException) as caught:
        jobs.write_status(existing["small"]["metadata"]["name"], status)
    assert words in str(json.loads(caught.value.body)["message"])


def test_kubectl_get_shows_how_a_job_stands(cluster: ControlPlane, namespace: str) -> None:
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input_text=json.dumps(document("metadata.name=shown")))
    status = GRPOJobStatus(
        state="Training",
        progress=Progress(step=40, epoch=1.25, reward=0.75),
        checkpoints=Checkpoints(last_step=40),
        summary=Summary(trainers="1/1", rollouts="2/2"),
        restarts=1,
    ).document()
    patch = json.dumps({"status": status})
    cluster.kubectl("patch", "-n", namespace, "grpojob", "shown", "--subresource=status", "--type=merge", "-p", patch)
    header, row = cluster.kubectl("get", "grpo", "-n", namespace).splitlines()
    assert header.split() == [
        "NAME",
        "STATE",
        "STEP",
        "EPOCH",
        "REWARD",
        "CHECKPOINT",
        "TRAINERS",
        "ROLLOUTS",
        "RESTARTS",
        "AGE",
    ]
    assert row.split()[:-1] == ["shown", "Training", "40", "1.25", "0.75", "40", "1/1", "2/2", "1"]
    assert "grpojob.grpo.dev/shown" in cluster.kubectl("get", "all", "-n", namespace)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rollout", ["maxStaleness", "Policy versions that a sample may lag behind", "Unit: versions. Default: 0."]),
        ("rollout.replicas", ["<integer>", "May change on a running job."]),
        ("actor.optim.lr", ["<number>", "Peak learning rate. Default: 1e-06. In verl: actor.optim.lr."]),
        ("runtime.workspace", ["claimName", "-required-"]),
        ("failurePolicy.rules", ["RestartPod", "podConditions"]),
    ],
)
def test_kubectl_explain_reads_well(cluster: ControlPlane, path: str, words: list[str]) -> None:
    shown = " ".join(cluster.kubectl("explain", f"grpojob.spec.{path}").split())
    assert [word for word in words if word not in shown] == [], shown


def test_kubectl_explain_knows_the_status(cluster: ControlPlane) -> None:
    assert "Mean reward of the last step." in cluster.kubectl("explain", "grpojob.status.progress")


def test_load_job_and_the_api_server_read_the_same_examples() -> None:
    assert {load_job(path).name for path in EXAMPLES} == {path.stem for path in EXAMPLES}
