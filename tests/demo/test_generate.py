import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_worker.checkpoint import CheckpointTransaction
from grpo_worker.config import Spec
from grpo_worker.data.tokenizer import describe
from grpo_worker.demo.model import build_model
from grpo_worker.demo.tokenizer import MAX_CONTEXT_TOKENS, build_tokenizer
from grpo_worker.errors import CheckpointDamagedError, UsageError
from grpo_worker.evaluate import evaluate
from grpo_worker.generate import check_sampling, encode_prompts, find_model, generate, read_prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model as it is before any training."""
    directory = tmp_path_factory.mktemp("model")
    build_model(1).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def run_directory(model: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of steps 20 and 40, whose actors are the model."""
    for step in (20, 40):
        with CheckpointTransaction(tmp_path / "checkpoints", 0, step) as transaction:
            shutil.copytree(model, transaction.path / "actor")
            (transaction.path / "coordinator.json").write_text("{}")
            transaction.commit()
    return tmp_path


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("", "epoch_0_step_40"),
        ("checkpoints", "epoch_0_step_40"),
        ("checkpoints/latest", "latest"),
        ("checkpoints/epoch_0_step_20", "epoch_0_step_20"),
        ("checkpoints/epoch_0_step_20/actor", "epoch_0_step_20"),
    ],
)
def test_a_run_a_root_a_checkpoint_and_its_actor_name_a_model(run_directory: Path, named: str, found: str) -> None:
    assert find_model(run_directory / named) == run_directory / "checkpoints" / found / "actor"


def test_a_model_directory_names_itself(model: Path) -> None:
    assert find_model(model) == model


@pytest.mark.parametrize("named", ["checkpoints", "checkpoints/epoch_0_step_40", "checkpoints/epoch_0_step_40/actor"])
def test_a_damaged_model_is_never_loaded(run_directory: Path, named: str) -> None:
    os.truncate(run_directory / "checkpoints/epoch_0_step_40/actor/model.safetensors", 1000)
    with pytest.raises(CheckpointDamagedError, match=r"actor/model\.safetensors: 1000 bytes"):
        find_model(run_directory / named)


def test_damage_outside_the_model_does_not_matter_here(run_directory: Path) -> None:
    checkpoint = run_directory / "checkpoints/epoch_0_step_40"
    (checkpoint / "coordinator.json").unlink()
    assert find_model(checkpoint) == checkpoint / "actor"


def test_what_is_no_checkpoint_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"neither a model .* nor checkpoints .*It holds notes\.txt"):
        find_model(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        find_model(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="does not exist"):
        find_model(tmp_path / "none")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": -0.1}, "--temperature -0.1 is negative"),
        ({"top_p": 0.0}, "--top-p 0.0 is outside"),
        ({"top_p": 1.5}, "--top-p 1.5 is outside"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"n": 0}, "--n 0"),
        ({"n": 2, "temperature": 0.0}, "greedy completions are all the same"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_an_argument_out_of_range_names_its_option(changed: dict[str, float], message: str) -> None:
    arguments: dict[str, float] = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 8, "n": 1, "seed": 1, **changed}
    with pytest.raises(UsageError, match=message):
        check_sampling(**arguments)  # type: ignore[arg-type]


def test_no_prompt_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        generate(tmp_path, [])


def test_a_prompt_that_does_not_fit_is_named_and_never_cut() -> None:
    info = describe(build_tokenizer(), Path("demo"))
    with pytest.raises(UsageError, match=r"prompt 2 \('7777.*is longer than 10 tokens: the model's context is 26"):
        encode_prompts(info, ["1+2=", "7" * 11], max_prompt_tokens=10, max_tokens=16)
    with pytest.raises(UsageError, match="--max-tokens 256 fills the model's context of 256 tokens"):
        encode_prompts(info, ["1+2="], max_prompt_tokens=0, max_tokens=MAX_CONTEXT_TOKENS)


def test_prompts_come_from_lines_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("1+2=\n\n3+4=\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two\\nlines"}\n{"prompt": "3+4="}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "3+4="}\n{"text": "3+4="}\n')
    assert read_prompts(tmp_path / "prompts.txt") == ["1+2=", "3+4="]
    assert read_prompts(tmp_path / "prompts.jsonl") == ["two\nlines", "3+4="]
    with pytest.raises(UsageError, match=r"bad\.jsonl line 2"):
        read_prompts(tmp_path / "bad.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_the_engine_says_what_the_model_says(run_directory: Path) -> None:
    """Greedy completions equal transformers' own."""
    pytest.importorskip("vllm")
    import torch

    prompts = ["482+359=", "100+100=", "7"]
    completions = generate(run_directory, prompts, temperature=0.0, max_tokens=12)
    model, tokenizer = build_model(1), build_tokenizer()
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        input_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(input_ids=input_ids, do_sample=False, max_new_tokens=12)[0, input_ids.shape[1] :]
        assert completion == tokenizer.decode(output, skip_special_tokens=True)


def test_a_checkpoint_is_validated_as_a_run_would(run_directory: Path, tmp_path: Path) -> None:
    """Greedy answers and their grades are those that transformers' own answers get."""
    pytest.importorskip("vllm")
    import datasets
    import torch

    sums = [("48+35=", "83"), ("100+100=", "200"), ("7+5=", "12"), ("999+1=", "1000")]
    model, tokenizer = build_model(1), build_tokenizer()
    answers = []
    for prompt, _ in sums:
        input_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(input_ids=input_ids, do_sample=False, max_new_tokens=12)[0, input_ids.shape[1] :]
        answers.append(tokenizer.decode(output, skip_special_tokens=True))
    # One truth is what the model says, so that not all is wrong.
    rows = [{"prompt": prompt, "reward": truth, "data_source": "sums"} for prompt, truth in sums]
    rows[1] |= {"reward": answers[1].strip() or "none", "data_source": "echo"}
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "job.yaml").write_text(
        "apiVersion: grpo.dev/v1alpha1\nkind: GRPOJob\nmetadata: {name: sums}\nspec:\n  model: {path: none}\n"
        "  data: {trainFiles: [none.parquet], maxPromptLength: 16, maxResponseLength: 12}\n  reward: {function: exactMatch}\n"
        "  rollout: {validation: {'n': 2}}\n"
    )
    command = [sys.executable, "-m", "grpo_worker.cli.main", "eval", str(tmp_path / "job.yaml"), "--json"]
    options = ["--checkpoint", str(run_directory), "--data", str(tmp_path / "test.jsonl"), "--dump", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    right = [answer.strip() == row["reward"] for answer, row in zip(answers, rows, strict=True)]
    assert right[1] and metrics["val/accuracy/pass@1"] == sum(right) / 4
    assert metrics["val/echo/accuracy/pass@1"] == 1.0
    assert metrics["val/sums/accuracy/pass@1"] == (right[0] + right[2] + right[3]) / 3
    assert {"val/accuracy/mean@2", "val/accuracy/pass@2", "val/accuracy/maj@2", "val/score/best@2"} <= metrics.keys()
    kept = datasets.load_dataset("parquet", data_files=str(tmp_path / "validation-000000.parquet"), split="train")
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in kept["token_ids"]]
    assert texts == answers and set(kept["advantage"]) == {None}


def test_an_evaluation_without_data_says_what_to_name(run_directory: Path) -> None:
    spec = Spec.model_validate({"model": {"path": "none"}, "reward": {"function": "math"}})
    with pytest.raises(UsageError, match=r"data\.validationFiles: none\. Name files with --data"):
        evaluate(spec, find_model(run_directory))
