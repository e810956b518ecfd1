"""The packed forward pass against Hugging Face's own, one sequence at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainer_helpers import options_for, plain_log_probs, save_tiny_model, sequences_of, single_rank
from transformers import AutoModelForCausalLM

from grpo_worker.errors import ConfigError, DataError
from grpo_worker.trainer.batch import Sequences
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.model import PolicyModel, build_policy, named_parameters
from grpo_worker.trainer.options import TrainerOptions
from grpo_worker.trainer.update import compute_log_probs

LENGTHS = [(5, 7), (3, 40), (10, 4), (6, 6), (1, 1), (2, 30)]


def policy(options: TrainerOptions) -> PolicyModel:
    return build_policy(options, single_rank().mesh)


def log_probs_of(model: PolicyModel, sequences: Sequences, options: TrainerOptions) -> tuple[np.ndarray, np.ndarray]:
    return compute_log_probs(model, sequences, options, single_rank(), options.spec.rollout)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "packing",
    [
        {"actor": {"ppoMaxTokenLenPerGPU": 4096}},
        {"rollout": {"logProbMaxTokenLenPerGPU": 48}},
        {"rollout": {"logProbMicroBatchSizePerGPU": 1}},
        {"rollout": {"logProbMicroBatchSizePerGPU": 3}, "model": {"useRemovePadding": False}},
    ],
    ids=["one row", "token budget", "one by one", "padded"],
)
def test_log_probs_and_entropy_equal_plain_transformers(
    tmp_path: Path, tied: bool, temperature: float, packing: dict[str, Any]
) -> None:
    model = save_tiny_model(tmp_path, tied=tied)
    options = options_for(model, **packing | {"rollout": packing.get("rollout", {}) | {"temperature": temperature}})
    sequences = sequences_of(LENGTHS)
    log_probs, entropy = log_probs_of(policy(options), sequences, options)
    expected_log_probs, expected_entropy = plain_log_probs(model, sequences, temperature)
    np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, atol=1e-5)


def test_a_neighbour_in_the_row_changes_nothing(tmp_path: Path) -> None:
    options = options_for(save_tiny_model(tmp_path))
    model = policy(options)
    alone, _ = log_probs_of(model, sequences_of([(5, 7)], seed=3), options)
    both = sequences_of([(5, 7), (5, 7)], seed=3)
    together, _ = log_probs_of(model, both, options)
    first = sequences_of([(5, 7)], seed=3).token_ids
    assert (both.token_ids[:12] == first).all()
    np.testing.assert_allclose(together[:7], alone, atol=1e-6)


def test_parameter_names_are_the_checkpoints(tmp_path: Path) -> None:
    options = options_for(save_tiny_model(tmp_path, tied=True))
    names = [name for name, _ in named_parameters(policy(options))]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert names == [name for name, _ in plain.named_parameters()]
    assert "lm_head.weight" not in names


def test_a_missing_model_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.path.*nowhere"):
        policy(options_for(tmp_path / "nowhere"))


def test_an_attention_window_is_right_with_padding(tmp_path: Path) -> None:
    layer_types = ["sliding_attention", "full_attention"]
    model = save_tiny_model(tmp_path, use_sliding_window=True, sliding_window=32, layer_types=layer_types)
    options = options_for(model, model={"useRemovePadding": False})
    sequences = sequences_of([(20, 40), (3, 5)])
    log_probs, _ = log_probs_of(policy(options), sequences, options)
    np.testing.assert_allclose(log_probs, plain_log_probs(model, sequences, 1.0)[0], atol=1e-5)


def test_sequences_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings of 256"):
        TrainerEngine(options_for(save_tiny_model(tmp_path), data={"maxResponseLength": 512}), single_rank())
