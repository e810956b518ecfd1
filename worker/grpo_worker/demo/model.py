"""A Qwen3 of 400 thousand parameters: the architecture of the real thing, at a size that two CPU cores train.

Invariant: the weights are a function of the seed alone.
"""

from typing import TYPE_CHECKING

from grpo_worker.demo.tokenizer import EOS, MAX_CONTEXT_TOKENS, PAD, VOCABULARY

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


def build_model(seed: int) -> "Qwen3ForCausalLM":
    """A randomly initialised float32 model whose vocabulary is the character tokenizer's."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    eos, pad = VOCABULARY.index(EOS), VOCABULARY.index(PAD)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model.eval()
