"""How much of the device an update uses: model FLOPs over what the device could have done.

Invariant: model FLOPs (PaLM, arXiv 2204.02311, appendix B): what one forward and one backward pass of the tokens at hand need, whatever was
recomputed or padded, a prompt that its sequences share once. Without a known peak there is no number.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from grpo_worker.trainer.packing import ATTENTION_PARITY_TOKENS

# Dense bfloat16 FLOP/s of the data sheets (no sparsity), by words of the device's name; the first that fits.
PEAK_FLOPS = (
    ("GB200", 2500e12), ("B200", 2250e12), ("GH200", 989e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12),
    ("H100", 989e12), ("H800", 989e12), ("H20", 148e12), ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12), ("L40", 181e12),
    ("L20", 119.5e12), ("L4", 121e12), ("A40", 149.7e12), ("A10G", 70e12), ("A10", 125e12), ("A30", 165e12), ("RTX 4090", 165e12),
    ("MI300X", 1307e12), ("MI325X", 1307e12), ("MI250", 362e12),
)  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """bfloat16 FLOP/s of a device, None when it is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)), None)


@dataclass(frozen=True)
class ModelFlops:
    """What a dense decoder with full causal attention needs for training."""

    parameters: int  # that tokens are multiplied with: the LM head's, not a table that they are looked up in
    layers: int
    heads: int
    head_size: int

    @classmethod
    def of(cls, lm: PreTrainedModel) -> "ModelFlops | None":
        """None for a mixture of experts, in which a token meets a part of the parameters, for layers without full attention, and for
        unknown shapes."""
        config = lm.config
        heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
        experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
        other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if experts or other_layers or not isinstance(heads, int) or not isinstance(layers, int):
            return None
        table: Any = lm.get_input_embeddings()
        head: Any = lm.get_output_embeddings()
        looked_up = 0 if table.weight is head.weight else table.weight.numel()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(sum(parameter.numel() for parameter in lm.parameters()) - looked_up, layers, heads, head_size)

    def training(self, lengths: Sequence[int]) -> float:
        """Of sequences of so many tokens, forward and backward: 6 N a token, and 12 L H Q T for attention, of which a causal mask needs half."""
        tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
        return 6.0 * self.parameters * tokens + 6.0 * self.layers * self.heads * self.head_size * pairs


def parity_tokens(flops: ModelFlops | None) -> float:
    """Length at which attention needs as much as all other products, 6 N T = 6 L H Q T^2; a usual one for an unknown model."""
    return flops.parameters / (flops.layers * flops.heads * flops.head_size) if flops else ATTENTION_PARITY_TOKENS


def device_peak(device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """The peak that this process's device has for `compute_dtype`; None on CPU, for other types, and for unknown devices."""
    if device.type != "cuda" or compute_dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_flops(torch.cuda.get_device_name(device))
