"""Which models the trainer computes right is found out when it starts. Verdicts on tiny copies of real families."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_helpers import options_for, plain_log_probs, save_tiny_model, sequences_of, single_rank
from transformers import AutoModelForCausalLM, GraniteConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from grpo_worker.errors import ConfigError
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.self_check import LENGTHS, TOLERANCE, Specimen, check_model, logit_scale
from grpo_worker.trainer.tiny_copy import WINDOW_TOKENS, tiny_copy
from grpo_worker.trainer.update import compute_log_probs

LONGEST = 1536
GRANITE = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.015625}
RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 4096}),
    ("gemma3_text", {"sliding_window": 2048}),
    ("phi3", {}),
    ("olmo2", {}),
    ("gpt2", {}),
    ("opt", {}),
    ("granite", GRANITE),
    ("cohere", {}),
]
PADDED_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 1024}),
    ("gemma3_text", {"sliding_window": 1024}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 2}),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"], "num_hidden_layers": 4}),
    ("qwen3_5_text", {}),
    ("falcon_h1", {"lm_head_multiplier": 0.0195}),
    ("bloom", {}),
]
NEVER: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {}, r"log-probs differ by up to \d"),  # a soft cap on its logits
    ("phi", {}, r"log-probs differ by up to \d"),  # a bias in its head
    ("mixtral", {}, r"mlp\.experts\.down_proj is not in the model's files"),
    ("qwen3_moe", {}, r"mlp\.experts\.down_proj is not in the model's files"),
    ("gpt_neox", {}, r"lm_head\.weight is not in the model's files"),
    ("bert", {}, "no causal model"),
]


def config_of(family: str, settings: dict[str, Any]) -> Any:
    return CONFIG_MAPPING[family](**settings)


@pytest.mark.parametrize(("family", "settings"), RIGHT, ids=[name for name, _ in RIGHT])
def test_models_that_are_right_packed_and_padded(family: str, settings: dict[str, Any]) -> None:
    specimen = Specimen(config_of(family, settings), LONGEST)
    for packed in (True, False):
        outcome = specimen.outcome(packed)
        assert outcome.passed, (packed, str(outcome))
    assert not specimen.renamed


@pytest.mark.parametrize(("family", "settings"), PADDED_ONLY, ids=[name for name, _ in PADDED_ONLY])
def test_models_that_mix_packed_sequences_say_what_to_set(family: str, settings: dict[str, Any]) -> None:
    config = config_of(family, settings)
    with pytest.raises(ConfigError, match=rf"{family} is wrong when sequences are packed: .*useRemovePadding: false"):
        check_model(config, True, LONGEST)
    check_model(config, False, LONGEST)


@pytest.mark.parametrize(("family", "settings", "words"), NEVER, ids=[name for name, _, _ in NEVER])
@pytest.mark.parametrize("packed", [True, False])
def test_models_that_are_wrong_either_way_are_refused_by_name(
    family: str, settings: dict[str, Any], words: str, packed: bool
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.path: .*{family}.*{words}|model\.path: .*{words}"):
        check_model(config_of(family, settings), packed, LONGEST)


def test_a_window_that_the_job_never_reaches_is_no_reason_to_refuse() -> None:
    config = config_of("mistral", {"sliding_window": 1024})
    assert tiny_copy(config, 1024).sliding_window >= sum(map(max, zip(*LENGTHS, strict=True)))
    assert tiny_copy(config, 1025).sliding_window == WINDOW_TOKENS < min(map(sum, LENGTHS[:-1]))
    check_model(config, True, 1024)


def test_a_copy_keeps_every_kind_of_layer_and_the_ratio_of_heads() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = config_of("gemma3_text", {"layer_types": kinds * 4, "num_hidden_layers": 24})
    tiny = tiny_copy(config, LONGEST)
    assert tiny.layer_types == (kinds * 4)[: tiny.num_hidden_layers]
    assert set(tiny.layer_types) == set(kinds) and tiny.num_hidden_layers < 10
    wide = config_of("llama", {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8})
    tiny = tiny_copy(wide, LONGEST)
    assert (tiny.num_attention_heads, tiny.num_key_value_heads, tiny.hidden_size) == (4, 2, 512)


def test_the_check_moves_no_random_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    check_model(config_of("llama", {}), True, LONGEST)
    assert torch.equal(torch.rand(2), expected)


def test_the_scale_of_logits_is_that_of_the_real_width() -> None:
    # MiniCPM divides by hidden_size / dim_model_base: a narrow copy would have another scale.
    assert logit_scale(config_of("minicpm3", {"hidden_size": 2560, "dim_model_base": 256})) == pytest.approx(0.1)
    assert logit_scale(config_of("cohere", {"logit_scale": 0.0625})) == pytest.approx(0.0625)
    assert logit_scale(config_of("gemma2", {})) == 1.0


def test_a_scaled_head_trains_with_the_models_own_log_probs(tmp_path: Path) -> None:
    config = GraniteConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, **GRANITE,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = options_for(tmp_path, rollout={"temperature": 0.7}, actor={"useKLLoss": True})
    engine = TrainerEngine(options, single_rank())
    sequences = sequences_of([(5, 7), (3, 40), (10, 4)])
    expected = plain_log_probs(tmp_path, sequences, 0.7)[0]
    for model in (engine.model, engine.reference):
        assert model is not None
        found = compute_log_probs(model, sequences, options, single_rank(), options.spec.rollout)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    engine.close()


def test_a_trainer_refuses_to_start_on_a_model_that_it_would_train_wrong(tmp_path: Path) -> None:
    save_tiny_model(
        tmp_path, use_sliding_window=True, sliding_window=32, layer_types=["sliding_attention", "full_attention"]
    )
    with pytest.raises(ConfigError, match="useRemovePadding: false"):
        TrainerEngine(options_for(tmp_path), single_rank())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sliding_window"] < 128, "the job's sequences pass the window"


def test_what_passes_is_far_from_what_fails() -> None:
    right = Specimen(config_of("llama", {}), LONGEST).outcome(True)
    leaks = Specimen(config_of("mistral", {"sliding_window": 1024}), LONGEST).outcome(True)
    assert max(right.log_prob, right.gradient) * 10 < TOLERANCE < min(leaks.log_prob, leaks.gradient) / 10
