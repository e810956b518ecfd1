"""A model's files into the shards of a trainer: every bit, the same names, and plain words when they do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_helpers import options_for, save_tiny_model, sequences_of, single_rank, whole_parameters
from transformers import AutoModelForCausalLM

from grpo_worker.errors import DataError
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.model import build_policy
from grpo_worker.trainer.update import compute_log_probs


def save_in(directory: Path, dtype: torch.dtype, shard_size: str = "5GB", tied: bool = True) -> Path:
    save_tiny_model(directory, tied=tied)
    lm = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    (directory / "model.safetensors").unlink()
    lm.save_pretrained(directory, max_shard_size=shard_size)
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"], ids=["one file", "many files"])
@pytest.mark.parametrize("param_offload", [False, True], ids=["device", "offloaded"])
def test_every_bit_of_the_files_is_loaded(
    tmp_path: Path, tied: bool, dtype: torch.dtype, shard_size: str, param_offload: bool
) -> None:
    options = options_for(save_in(tmp_path, dtype, shard_size, tied))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
    loaded = whole_parameters(build_policy(options, single_rank().mesh, param_offload=param_offload))
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    assert list(loaded) == list(expected)
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in loaded.items())


def test_the_reference_begins_as_the_policy_in_bfloat16_too(tmp_path: Path) -> None:
    """Its weights are kept in the compute dtype; the rotary frequencies must not be."""
    model = save_in(tmp_path, torch.bfloat16)
    options = options_for(model, model={"dtype": "bfloat16"}, actor={"useKLLoss": True})
    engine = TrainerEngine(options, single_rank())
    assert engine.reference is not None
    sequences, limits = sequences_of([(60, 60), (3, 40)]), options.spec.rollout
    policy = compute_log_probs(engine.model, sequences, options, single_rank(), limits)[0]
    reference = compute_log_probs(engine.reference, sequences, options, single_rank(), limits)[0]
    np.testing.assert_array_equal(reference, policy)
    engine.close()


def test_a_tensor_that_the_files_lack_is_named(tmp_path: Path) -> None:
    file = save_tiny_model(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(DataError, match=r"model\.path: .*holds no tensor model\.embed_tokens\.weight"):
        build_policy(options_for(tmp_path), single_rank().mesh)


def test_weights_and_config_of_two_models_are_named(tmp_path: Path) -> None:
    config = save_tiny_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(
        DataError, match=r"mlp\.gate_proj\.weight has shape \(96, 64\) in model\.safetensors and \(128, 64\)"
    ):
        build_policy(options_for(tmp_path), single_rank().mesh)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight_scale_inv", "model.layers.9.self_attn.q_proj.weight"]
)
def test_a_tensor_that_the_model_does_not_have_is_named(tmp_path: Path, name: str) -> None:
    """Quantised weights have the right names and shapes; without their scales they are other weights."""
    file = save_tiny_model(tmp_path) / "model.safetensors"
    save_file({**load_file(file), name: torch.ones(2)}, file)
    with pytest.raises(
        DataError, match=rf"model\.path: .*1 tensors that are no parameters of the model, the first {name}"
    ):
        build_policy(options_for(tmp_path), single_rank().mesh)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    file = save_tiny_model(tmp_path) / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, file)
    build_policy(options_for(tmp_path), single_rank().mesh)
