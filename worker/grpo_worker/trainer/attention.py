"""Causal attention over sequences packed into one row, as a Transformers attention function.

Invariant: a token attends to the earlier tokens of its own sequence alone; neighbours in the row do not exist for it. Responses that share
their prompt's tokens (`actor.sharePrompts`) are segments of their own, whose keys are the prompt's and theirs.
On CUDA in half precision the variable-length flash kernel of PyTorch runs; elsewhere scaled_dot_product_attention
runs on each sequence, or on all of them padded where little is padded. Padding goes to the right, so a causal mask
suffices.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED_ATTENTION = "grpo_packed"
MAX_PADDING_RATIO = 2.0  # padded tokens over real ones up to which one padded call beats one call a sequence

HALF_DTYPES = (torch.bfloat16, torch.float16)
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch built without it
    varlen_attn = None  # type: ignore[assignment]


def _varlen_arguments() -> dict[str, Any]:
    """How this PyTorch spells causal attention with grouped queries (the signature grew from 2.10 to 2.13)."""
    known = inspect.signature(varlen_attn).parameters if varlen_attn is not None else {}
    arguments: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return {**arguments, "enable_gqa": True} if "enable_gqa" in known else arguments


VARLEN_ARGUMENTS = _varlen_arguments()


@dataclass(frozen=True)
class Segments:
    """Neighbouring tokens of a row that are queries together. The last one sees all the segment's keys, the one before it all but one."""

    lengths: tuple[int, ...]
    cu_lengths: Tensor  # int32 [segments + 1]
    key_lengths: tuple[int, ...]
    cu_key_lengths: Tensor  # int32 [segments + 1]
    key_index: Tensor | None  # int64 [keys]: places in the row; None: each segment's keys are its own tokens

    def arguments(self) -> dict[str, Any]:
        """What the model's forward passes through to each attention layer."""
        own: dict[str, Any] = {} if self.key_index is None else {"key_index": self.key_index}
        if self.cu_lengths.device.type == "cuda":
            return own | {
                "cu_seq_lens_q": self.cu_lengths,
                "cu_seq_lens_k": self.cu_key_lengths,
                "max_length_q": max(self.lengths),
                "max_length_k": max(self.key_lengths),
            }
        return own | {"sequence_lengths": self.lengths, "key_lengths": self.key_lengths}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    key_lengths: tuple[int, ...] | None = None,
    key_index: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, head width], key and value [1, key-value heads, ...] -> [1, tokens, heads, head
    width].
    """
    if key_index is not None:
        key, value = key.index_select(2, key_index), value.index_select(2, key_index)
    if cu_seq_lens_q is not None and query.dtype in HALF_DTYPES and varlen_attn is not None:
        assert cu_seq_lens_k is not None and max_length_q is not None and max_length_k is not None
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        if "enable_gqa" not in VARLEN_ARGUMENTS and k.shape[1] != q.shape[1]:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        output = varlen_attn(
            q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale=scaling, **VARLEN_ARGUMENTS
        )
        assert isinstance(output, Tensor)
        return output.unsqueeze(0), None
    if sequence_lengths is None:
        assert cu_seq_lens_q is not None and cu_seq_lens_k is not None
        sequence_lengths, key_lengths = tuple(cu_seq_lens_q.diff().tolist()), tuple(cu_seq_lens_k.diff().tolist())
    if key_index is not None:
        assert key_lengths is not None
        return _one_by_one(query, key, value, sequence_lengths, key_lengths, scaling), None
    padded = max(sequence_lengths) * len(sequence_lengths)
    if padded <= MAX_PADDING_RATIO * sum(sequence_lengths):
        return _padded(query, key, value, sequence_lengths, scaling), None
    return _one_by_one(query, key, value, sequence_lengths, sequence_lengths, scaling), None


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    scaling: float | None,
) -> Tensor:
    outputs = []
    pieces = (tensor.split(key_lengths, dim=2) for tensor in (key, value))
    for q, k, v in zip(query.split(lengths, dim=2), *pieces, strict=True):
        queries, keys = q.shape[2], k.shape[2]
        before = keys - queries
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(before) if before else None
        outputs.append(
            scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not before, scale=scaling, enable_gqa=True)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _padded(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None) -> Tensor:
    def spread(tensor: Tensor) -> Tensor:
        rows = tensor[0].transpose(0, 1).split(lengths)
        return pad_sequence(rows, batch_first=True).transpose(1, 2)

    output = scaled_dot_product_attention(
        spread(query), spread(key), spread(value), is_causal=True, scale=scaling, enable_gqa=True
    )
    rows = output.transpose(1, 2)
    return torch.cat([rows[i, :length] for i, length in enumerate(lengths)]).unsqueeze(0)


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
