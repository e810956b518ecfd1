"""What `grpo submit` sends, and what it says before."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from grpo_operator.cli.document import cluster_notes, read_document, require_workspace, target_namespace
from grpo_worker.config import load_job
from grpo_worker.errors import UsageError

MINIMAL = """
apiVersion: grpo.dev/v1alpha1
kind: GRPOJob
metadata: {name: small}
spec:
  model: {path: demo/model}
  data: {trainFiles: [demo/train.parquet]}
  reward: {function: gsm8k}
  algorithm: {preset: DAPO}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL)
    return str(path)


def test_defaults_and_presets_are_not_sent(file: str) -> None:
    document = read_document(file, ["rollout.replicas=2", "metadata.labels.team=rl"])
    assert document["metadata"] == {"name": "small", "labels": {"team": "rl"}}
    assert document["spec"] == {
        "model": {"path": "demo/model"},
        "data": {"trainFiles": ["demo/train.parquet"]},
        "reward": {"function": "gsm8k"},
        "algorithm": {"preset": "DAPO"},
        "rollout": {"replicas": 2},
    }


def test_an_object_that_was_read_from_a_cluster_can_be_sent_again(tmp_path: Path) -> None:
    document = yaml.safe_load(MINIMAL)
    document["metadata"] |= {"uid": "u", "resourceVersion": "5", "generation": 2, "managedFields": [{"manager": "x"}]}
    document["status"] = {"state": "Failed"}
    path = tmp_path / "read.yaml"
    path.write_text(yaml.safe_dump(document))
    assert read_document(str(path), []) == yaml.safe_load(MINIMAL)


@pytest.mark.parametrize(
    ("written", "asked", "expected"),
    [(None, None, "of-context"), (None, "asked", "asked"), ("written", None, "written"), ("same", "same", "same")],
)
def test_the_namespace_is_of_the_file_or_the_command_line_or_the_context(
    written: str | None, asked: str | None, expected: str
) -> None:
    document = {"metadata": {"name": "x", **({"namespace": written} if written else {})}}
    assert target_namespace(document, asked, "of-context") == expected


def test_two_namespaces_are_refused() -> None:
    with pytest.raises(UsageError, match=r"-n here: the file says metadata\.namespace: there"):
        target_namespace({"metadata": {"namespace": "there"}}, "here", "default")


def test_a_job_without_a_workspace_is_refused_with_its_remedy(file: str) -> None:
    with pytest.raises(
        UsageError, match=r"spec\.runtime\.workspace: missing.*--set runtime\.workspace\.claimName=NAME"
    ):
        require_workspace(load_job(file).spec)


def test_what_is_read_from_the_volume_is_told(file: str) -> None:
    spec = load_job(file, ["runtime.workspace.claimName=shared"]).spec
    require_workspace(spec)
    assert cluster_notes(spec) == ["read from the volume of claim shared, not from this machine: demo/train.parquet"]
    Path("demo/model").mkdir(parents=True)
    assert "demo/train.parquet, demo/model" in cluster_notes(spec)[0]


def test_a_path_outside_of_the_volumes_is_told(file: str) -> None:
    overrides = [
        "runtime.workspace.claimName=shared",
        "runtime.volumes=[{name: data, claimName: data, mountPath: /data}]",
        "data.trainFiles=[/data/train.parquet, /datasets/more.parquet]",
        "checkpoint.path=/checkpoints",
        "suspend=true",
    ]
    assert cluster_notes(load_job(file, overrides).spec) == [
        "data.trainFiles: /datasets/more.parquet is on none of the job's volumes (/workspace, /data); it has to be in the image",
        "checkpoint.path: /checkpoints is on none of the job's volumes (/workspace, /data): checkpoints cannot be written there",
        "spec.suspend: true: the job waits until `grpo resume`",
    ]


def test_nothing_is_asked_of_a_cluster_before_the_document_is_valid(
    grpo: Callable[[Sequence[str]], int], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ["--kubeconfig", "/nowhere/config"]
    assert grpo(["submit", file, *nowhere]) == 64
    assert "spec.runtime.workspace" in capsys.readouterr().err
    assert grpo(["submit", file, "--set", "rollout.n=0", *nowhere]) == 64
    assert "spec.rollout.n = 0" in capsys.readouterr().err
    assert grpo(["submit", file, "--set", "runtime.workspace.claimName=shared", *nowhere]) == 78
    assert "no kubeconfig at /nowhere/config" in capsys.readouterr().err
