"""A tokenizer of characters, and a module of reward functions that misbehave when a response says so."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from grpo_worker.demo.tokenizer import build_tokenizer

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
