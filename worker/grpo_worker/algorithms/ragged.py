"""Sums and means over ragged flat data.

Invariant: a batch is flat. Per-token tensors are `[tokens]`, the response tokens of all sequences one after another;
`seq_ids [tokens]` holds for each token the index, below `num_seqs`, of its sequence. A value at a masked token (padding
or rejected) never reaches a result, even if it is NaN. Nothing here loops over tokens in Python.
"""

import torch
from torch import Tensor


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """`values [tokens]` with exact zeros where `mask [tokens]` (bool or 0/1) is unset."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def sum_by_sequence(values: Tensor, mask: Tensor, seq_ids: Tensor, num_seqs: int) -> Tensor:
    """Sum of the valid `values [tokens]` of each sequence: `[sequences]`."""
    return values.new_zeros(num_seqs).index_add(0, seq_ids, keep(values, mask))


def count_by_sequence(mask: Tensor, seq_ids: Tensor, num_seqs: int) -> Tensor:
    """Number of valid tokens of each sequence: int64 `[sequences]`."""
    counts = torch.zeros(num_seqs, dtype=torch.int64, device=mask.device)
    return counts.index_add(0, seq_ids, mask.bool().to(torch.int64))


def mean_by_sequence(values: Tensor, mask: Tensor, seq_ids: Tensor, num_seqs: int) -> Tensor:
    """Mean of the valid `values [tokens]` of each sequence, 0 for a fully masked one: `[sequences]`."""
    counts = count_by_sequence(mask, seq_ids, num_seqs).clamp(min=1)
    return sum_by_sequence(values, mask, seq_ids, num_seqs) / counts


def max_by_sequence(values: Tensor, mask: Tensor, seq_ids: Tensor, num_seqs: int) -> Tensor:
    """Largest of the valid `values [tokens]` of each sequence, 0 for a fully masked one: `[sequences]`."""
    valid = mask.bool()
    largest = values.new_zeros(num_seqs)
    return largest.scatter_reduce(0, seq_ids[valid], values[valid], reduce="amax", include_self=False)
