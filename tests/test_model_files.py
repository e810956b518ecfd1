"""`model.path` as a directory and as a Hugging Face id: one directory for all roles, or an error that says what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_cache import add_snapshot
from huggingface_hub import constants
from safetensors.torch import save_file

from grpo_worker.errors import DataError
from grpo_worker.model_files import parameter_count, resolve_model

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of 4 x 8 + 8 parameters."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({"embed": torch.zeros(4, 8), "norm": torch.ones(8)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def refusal(path: str, revision: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        resolve_model(path, revision)
    return str(caught.value)


def test_a_hub_id_is_the_snapshot_in_the_cache(cache: Path, source: Path) -> None:
    snapshot = add_snapshot(cache, "owner/tiny", source, FIRST)
    assert resolve_model("owner/tiny") == snapshot
    assert resolve_model("owner/tiny", FIRST) == snapshot
    assert parameter_count(snapshot) == 40


def test_a_branch_that_moves_gives_a_run_no_second_model(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_RUN_DIR", str(tmp_path / "run"))
    first = add_snapshot(cache, "owner/tiny", source, FIRST)
    assert resolve_model("owner/tiny") == first
    second = add_snapshot(cache, "owner/tiny", source, SECOND)
    assert resolve_model("owner/tiny") == first
    assert resolve_model("owner/tiny", SECOND) == second, "another revision in the document is another model"
    monkeypatch.setenv("GRPO_RUN_DIR", str(tmp_path / "another-run"))
    assert resolve_model("owner/tiny") == second


def test_roles_that_start_at_once_agree_while_the_branch_moves(cache: Path, source: Path, tmp_path: Path) -> None:
    """Processes that race: each finds the branch where it happens to be, all end with the commit that was written down first."""
    for commit in (FIRST, SECOND):
        add_snapshot(cache, "owner/tiny", source, commit)
    program = (
        "import sys, pathlib; from grpo_worker.model_files import resolve_model\n"
        "sys.stdin.readline(); pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); print(resolve_model('owner/tiny').name)"
    )
    ref = cache / "models--owner--tiny" / "refs" / "main"
    environment = {**os.environ, "GRPO_RUN_DIR": str(tmp_path / "run"), "HF_HUB_CACHE": str(cache)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(ref), commit],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for commit in (FIRST, SECOND, FIRST, SECOND)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    names = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert len(set(names)) == 1
    assert names[0] in (FIRST, SECOND)


def test_an_id_that_is_not_in_the_cache_offline_says_so(cache: Path) -> None:
    text = refusal("nobody/no-such-model", "abc")
    assert "nobody/no-such-model at revision abc is not in the Hugging Face cache (HF_HUB_OFFLINE is set" in text


def test_a_snapshot_without_its_weights_is_refused_before_anything_is_loaded(cache: Path, source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(
        '{"weight_map": {"embed": "model-00001-of-00001.safetensors"}}'
    )
    add_snapshot(cache, "owner/partial", source, FIRST)
    assert "lacks 1 of the 1 files that model.safetensors.index.json names" in refusal("owner/partial")


def test_a_path_that_does_not_exist_suggests_its_siblings(tmp_path: Path) -> None:
    (tmp_path / "Qwen3-0.6B").mkdir()
    path = str(tmp_path / "Qwen3-0.6")
    assert refusal(path) == f"model.path: {path} does not exist. Did you mean {path}B?"
    assert "Nor does its directory" in refusal(str(tmp_path / "no" / "model"))
    (tmp_path / "file").write_text("x")
    assert "is a file. Name the directory" in refusal(str(tmp_path / "file"))


def test_a_directory_that_is_no_model_says_what_it_lacks(source: Path) -> None:
    (source / "model.safetensors").rename(source / "model.bin")
    assert "has no *.safetensors file. Save the model with safe_serialization=True" in refusal(str(source))
    (source / "config.json").unlink()
    assert "has no config.json" in refusal(str(source))
