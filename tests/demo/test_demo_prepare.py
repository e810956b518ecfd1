import json
import stat
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grpo_worker.cli.main import call
from grpo_worker.demo.prepare import HELD_OUT_PROBLEMS, TRAIN_PROBLEMS, DemoPaths, prepare_demo
from grpo_worker.demo.warmup import Recipe
from grpo_worker.errors import ConfigError, DataError, ExitCode

QUICK = Recipe(steps=2, batch_size=8)
ANY = (0.0, 1.0)


def _prepare(directory: Path, seed: int = 1) -> DemoPaths:
    return prepare_demo(directory, seed, recipe=QUICK, accuracy_window=ANY)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return _prepare(tmp_path_factory.mktemp("demo") / "demo")


def test_the_files_are_what_a_job_reads(demo: DemoPaths) -> None:
    train, held_out = pq.read_table(demo.train), pq.read_table(demo.test)
    assert train.column_names == held_out.column_names == ["prompt", "response", "reward"]
    assert (train.num_rows, held_out.num_rows) == (TRAIN_PROBLEMS, HELD_OUT_PROBLEMS)
    assert not set(train["prompt"].to_pylist()) & set(held_out["prompt"].to_pylist())
    for row in train.slice(0, 50).to_pylist():
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(a) + int(b) == int(row["reward"]) and row["response"].endswith(f"#### {row['reward']}")


def test_the_model_loads_and_others_may_read_it(demo: DemoPaths) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.model)
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    assert model.config.model_type == "qwen3" and model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    for path in demo.model.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044, path


def test_a_second_call_does_nothing(demo: DemoPaths) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.model.parent.rglob("*")}
    again = _prepare(demo.model.parent)
    assert again == demo
    assert {path: path.stat().st_mtime_ns for path in demo.model.parent.rglob("*")} == before


def test_the_same_seed_makes_the_same_bytes(demo: DemoPaths, tmp_path: Path) -> None:
    _prepare(tmp_path)
    for name in ("model/model.safetensors", "model/tokenizer.json", "train.parquet", "test.parquet", "demo.json"):
        assert (tmp_path / name).read_bytes() == (demo.model.parent / name).read_bytes(), name


@pytest.mark.parametrize("damage", ["model", "stamp", "missing", "seed"])
def test_what_does_not_fit_the_stamp_is_made_again(tmp_path: Path, damage: str) -> None:
    first = _prepare(tmp_path)
    weights = (first.model / "model.safetensors").read_bytes()
    if damage == "model":
        (first.model / "model.safetensors").write_bytes(weights[:-1] + b"\xff")
    elif damage == "stamp":
        (tmp_path / "demo.json").write_text("{")
    elif damage == "missing":
        first.test.unlink()
    again = _prepare(tmp_path, seed=2 if damage == "seed" else 1)
    assert again.test.is_file()
    assert json.loads((tmp_path / "demo.json").read_text())["seed"] == (2 if damage == "seed" else 1)
    assert ((first.model / "model.safetensors").read_bytes() == weights) == (damage != "seed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "model", "test.parquet", "train.parquet"]


def test_a_start_without_right_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"greedy accuracy of 0\.000, outside 0\.2\.\.0\.55.*another --seed"):
        prepare_demo(tmp_path, recipe=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Choose another directory"):
        _prepare(tmp_path / "file" / "demo")
    assert call(["demo", "prepare", str(tmp_path / "file" / "demo")]) == ExitCode.CONFIG
    assert "Choose another directory" in capsys.readouterr().err
