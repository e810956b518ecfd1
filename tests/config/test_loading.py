"""What a document means: numbers, overrides, presets, and the resolved document that stands for it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_worker.config import (
    GRPOJob,
    InvalidJob,
    job_from_document,
    load_job,
    load_written,
    parse_yaml,
    resolved_document,
    written_document,
)
from grpo_worker.config.presets import PRESETS
from grpo_worker.errors import UsageError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def document(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {"name": "job"},
        "spec": {
            "model": {"path": "model"},
            "data": {"trainFiles": ["train.parquet"]},
            "reward": {"function": "gsm8k"},
            **spec,
        },
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document()))
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E-6", 1e-6), ("1.0e-06", 1e-6), ("1.e-6", 1e-6), (".1e-5", 1e-6), ("+1e-6", 1e-6), ("-1e3", -1000.0),
        ("1e6", 1e6), ("1.5E+3", 1500.0), ("3e-4", 3e-4), ("0.000001", 1e-6),
    ],
)  # fmt: skip
def test_a_number_with_an_exponent_is_a_number(text: str, value: float) -> None:
    parsed = parse_yaml(f"lr: {text}", "test")["lr"]
    assert isinstance(parsed, float)
    assert parsed == value


@pytest.mark.parametrize("text", ["1e", "e6", "1e6x", "v1e6", "'1e-6'", '"1e-6"', "1e-6 warm"])
def test_what_only_looks_like_a_number_stays_text(text: str) -> None:
    assert isinstance(parse_yaml(f"lr: {text}", "test")["lr"], str)


def test_anchors_and_merge_keys_work_as_kubectl_reads_them() -> None:
    text = "a: &defaults {n: 5, topP: 0.9}\nb:\n  <<: *defaults\n  n: 8\n"
    assert parse_yaml(text, "test")["b"] == {"n": 8, "topP": 0.9}


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("actor.optim.lr=1e-5", lambda job: job.spec.actor.optim.lr == 1e-5),
        ("spec.actor.optim.lr=1E-5", lambda job: job.spec.actor.optim.lr == 1e-5),
        ("rollout.n=8", lambda job: job.spec.rollout.n == 8),
        ("data.trainFiles=[a.parquet, b.parquet]", lambda job: job.spec.data.train_files == ["a.parquet", "b.parquet"]),
        ("metadata.name=other", lambda job: job.name == "other"),
        ("reward.options.method=strict", lambda job: job.spec.reward.options == {"method": "strict"}),
        ("checkpoint.resume=a=b", lambda job: job.spec.checkpoint.resume == "a=b"),
        ("algorithm={preset: DAPO}", lambda job: job.spec.actor.clip_ratio_high == 0.28),
        (" trainer.seed =3", lambda job: job.spec.trainer.seed == 3),
    ],
)
def test_an_override_sets_one_value(file: Path, override: str, read: Any) -> None:
    assert read(load_job(file, [override]))


def test_the_last_override_wins(file: Path) -> None:
    assert load_job(file, ["rollout.n=3", "rollout.n=4"]).spec.rollout.n == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.n", "expected path=value"),
        ("=8", "expected path=value"),
        ("rollout..n=8", "expected path=value"),
        ("data.trainFiles.0=a", "trainFiles is not a section"),
        ("model.path.name=a", "path is not a section"),
        ("rollout.n=[1", "not valid YAML"),
        ("rollout.n={a: 1, a: 2}", "duplicate key"),
    ],
)
def test_a_bad_override_is_refused(file: Path, override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_job(file, [override])
    assert "--set" in str(caught.value)


def test_overrides_of_a_file_that_is_no_mapping_blame_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("- 1\n")
    with pytest.raises(UsageError, match="is not a mapping"):
        load_job(path, ["rollout.n=2"])


def read(job: GRPOJob, path: str) -> Any:
    node = job.model_dump(by_alias=True)["spec"]
    for key in path.split("."):
        node = node[key]
    return node


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_each_of_its_fields(name: str) -> None:
    job = job_from_document(document(algorithm={"preset": name}))
    assert {path: read(job, path) for path in PRESETS[name]} == PRESETS[name]


OTHER: dict[str, Any] = {
    "algorithm.advantageEstimator": "rloo", "algorithm.normAdvByStd": None, "algorithm.filterGroups.enable": None,
    "algorithm.overlongBuffer.enable": None, "actor.useKLLoss": None, "actor.lossAggMode": "token-sum", "actor.lossMode": "mine:loss",
    "actor.klLossCoef": 0.5, "actor.klLossType": "k2", "actor.clipRatioLow": 0.11, "actor.clipRatioHigh": 0.12,
}  # fmt: skip


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, values in PRESETS.items() for path in values])
def test_a_field_of_the_document_wins_over_the_preset(name: str, path: str) -> None:
    value = OTHER[path] if OTHER[path] is not None else not PRESETS[name][path]
    raw = document(algorithm={"preset": name})
    node = raw["spec"]
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    job = job_from_document(raw)
    expected = PRESETS[name] | {path: value}
    assert {key: read(job, key) for key in expected} == expected


def test_without_a_preset_the_defaults_hold() -> None:
    job = job_from_document(document())
    assert (job.spec.actor.clip_ratio_high, job.spec.actor.loss_agg_mode, job.spec.actor.use_kl_loss) == (
        0.2, "token-mean", False,
    )  # fmt: skip


def test_applying_a_preset_leaves_the_document_as_it_was() -> None:
    raw = document(algorithm={"preset": "DAPO"})
    job_from_document(raw)
    assert raw == document(algorithm={"preset": "DAPO"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_resolves_to_a_document_of_the_same_job(path: Path) -> None:
    assert_round_trip(load_job(path))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_to_a_document_of_the_same_job(name: str) -> None:
    assert_round_trip(job_from_document(document(algorithm={"preset": name})))


def test_values_that_a_function_gets_survive_resolving_nulls_included() -> None:
    assert_round_trip(
        job_from_document(document(reward={"function": "gsm8k", "options": {"a": None, "b": [None, {"c": 1e-9}]}}))
    )


def assert_round_trip(job: GRPOJob) -> None:
    text = yaml.safe_dump(resolved_document(job), sort_keys=False)
    assert job_from_document(parse_yaml(text, "resolved")) == job


SECRETS = {
    "env": [{"name": "A", "value": "sesame-1"}, {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
    "podTemplate": {
        "trainer": {"spec": {"containers": [{"name": "worker", "env": [{"name": "C", "value": "sesame-2"}]}], "initContainers": None}}
    },
}  # fmt: skip


def test_a_document_that_is_written_holds_names_of_variables_and_no_values(tmp_path: Path) -> None:
    job = job_from_document(document(runtime=SECRETS))
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(written_document(job)))
    assert "sesame" not in file.read_text()
    assert "name: A" in file.read_text() and "name: C" in file.read_text()
    written = load_written(file)
    assert [(v.name, v.value, v.value_from is None) for v in written.spec.runtime.env] == [
        ("A", "", True),
        ("B", None, False),
    ]
    assert written.spec.model_copy(update={"runtime": None}) == job.spec.model_copy(update={"runtime": None})
    assert written_document(written) == written_document(job)
    with pytest.raises(InvalidJob, match=r"runtime\.env = \['A'\]"):  # it is not run anew without its values
        load_job(file)


def test_a_wrong_value_of_a_variable_is_not_repeated() -> None:
    with pytest.raises(InvalidJob) as caught:
        job_from_document(document(runtime={"env": [{"name": "PIN", "value": 4711}]}))
    assert "spec.runtime.env[0].value: input should be a valid string" in str(caught.value)
    assert "4711" not in str(caught.value)


def test_the_resolved_document_of_a_preset_stands_without_it() -> None:
    resolved = resolved_document(job_from_document(document(algorithm={"preset": "GSPO"})))
    preset = resolved["spec"]["algorithm"].pop("preset")
    assert preset == "GSPO"
    job = job_from_document(resolved)
    assert {path: read(job, path) for path in PRESETS["GSPO"]} == PRESETS["GSPO"]


def test_a_status_that_the_api_server_wrote_is_left_aside() -> None:
    assert job_from_document({**document(), "status": {"phase": "Running"}}).name == "job"


def test_metadata_of_kubernetes_is_let_through() -> None:
    raw = document()
    raw["metadata"] |= {"uid": "1", "generation": 3, "managedFields": [{"manager": "kubectl"}]}
    assert job_from_document(raw).name == "job"
