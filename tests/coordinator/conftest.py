"""A tokenizer of characters, and a module of reward functions that misbehave when a response says so."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coordinator_helpers import TOKEN
from coordinator_stage import PROMPTS, Stage
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from grpo_worker.coordinator import dispatch, saver
from grpo_worker.demo.tokenizer import build_tokenizer
from grpo_worker.environment import COORDINATOR_PORT, JOB_TOKEN, RUN_DIRECTORY
from grpo_worker.ports import free_port

REWARDS = '''
import os, time

def judge(sample):
    """The response says what to do; a number is the score."""
    word = sample.response
    if word == "raise":
        raise RuntimeError("the verifier is broken")
    if word == "nan":
        return float("nan")
    if word == "exit":
        os._exit(7)
    if word == "hang":
        time.sleep(1000)
    if word.startswith("half"):
        return {"score": float(word[4:]), "acc": 0.5}
    return {"score": float(word), "acc": float(float(word) > 0), "seen": len(sample.ground_truth)}

def broken(sample):
    raise RuntimeError("the verifier is broken")

def last_digit(sample):
    """A function of the response and of the sample's place in its group: groups vary."""
    return float(len(sample.response) % 2 + (sample.response[:1] == "1"))
'''


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    """The file of the reward functions."""
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def stage(tmp_path: Path, rewards: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(saver, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(dispatch, "CHUNK_PROMPTS", 2)
    tokenizer.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "model" / "model.safetensors")
    columns = {"prompt": [f"{i}+1=" for i in range(PROMPTS)], "response": [""] * PROMPTS, "reward": [str(i + 1) for i in range(PROMPTS)]}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    port = free_port()
    monkeypatch.setenv(COORDINATOR_PORT, str(port))
    monkeypatch.setenv(JOB_TOKEN, TOKEN)
    monkeypatch.setenv(RUN_DIRECTORY, str(tmp_path / "run"))
    return Stage(tmp_path, f"http://127.0.0.1:{port}", rewards)
