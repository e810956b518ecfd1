"""Advantage estimators: who did better than expected, by how much.

Invariant: an estimator is a pure function of one whole training batch, so its result does not depend on how the batch
is later split over ranks and micro-batches. Group statistics are over the sequences that share a prompt. All rewards
count, also one that sits on a masked token: a rejected last token takes no gradient but the outcome of its sequence
stays known.

Every registered estimator, and a user's `module:function`, has the signature `AdvantageEstimator`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpo_worker.algorithms.ragged import keep
from grpo_worker.errors import DataError

GRPO_EPSILON = 1e-6
WHITEN_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """One training batch, flat.

    sequence_rewards `[sequences]`: the outcome reward as the reward function gave it.
    token_rewards `[tokens]`: reward per token with any KL penalty subtracted; without one, `outcome_rewards`. The
    built-in estimators use this one: the reward of a sequence is the sum over its tokens.
    mask `[tokens]`: 1 for tokens that are trained on. seq_ids `[tokens]`: each sequence's tokens are contiguous and in
    order. group_ids `[sequences]`: equal for the responses to one prompt.
    """

    sequence_rewards: Tensor
    token_rewards: Tensor
    mask: Tensor
    seq_ids: Tensor
    group_ids: Tensor
    norm_by_std: bool = True
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for name, reference in (("token_rewards", "seq_ids"), ("mask", "seq_ids"), ("group_ids", "sequence_rewards")):
            shape, expected = tuple(getattr(self, name).shape), tuple(getattr(self, reference).shape)
            if shape != expected or len(shape) != 1:
                raise DataError(f"AdvantageInputs.{name}: shape {shape} differs from {reference}'s {expected}.")
        if self.seq_ids.numel() and not 0 <= int(self.seq_ids.min()) <= int(self.seq_ids.max()) < self.num_seqs:
            raise DataError(f"AdvantageInputs.seq_ids: values must be in [0, {self.num_seqs}), one per sequence.")

    @property
    def num_seqs(self) -> int:
        return self.sequence_rewards.numel()

    def summed_rewards(self) -> Tensor:
        """R_i = sum_t r_{i,t}, masked tokens included: `[sequences]`."""
        return self.token_rewards.new_zeros(self.num_seqs).index_add(0, self.seq_ids, self.token_rewards)


class AdvantageEstimator(Protocol):
    """Returns the advantage of each token, `[tokens]`; values at masked tokens are ignored."""

    def __call__(self, batch: AdvantageInputs, /) -> Tensor: ...


def outcome_rewards(sequence_rewards: Tensor, seq_ids: Tensor) -> Tensor:
    """Token rewards `[tokens]` of outcome rewards `[sequences]`: each on the last token of its sequence, else 0."""
    positions = torch.arange(seq_ids.numel(), device=seq_ids.device)
    last = torch.full_like(sequence_rewards, -1, dtype=torch.int64)
    last = last.scatter_reduce(0, seq_ids, positions, reduce="amax")
    if bool((last < 0).any()):
        empty = int((last < 0).nonzero()[0])
        raise DataError(f"Sequence {empty} has no response token, so its reward has no token to sit on. Drop it.")
    token_rewards = sequence_rewards.new_zeros(seq_ids.numel())
    token_rewards[last] = sequence_rewards
    return token_rewards


def _center_by_group(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R_i - mean_g, the group's size, and the group index in 0..groups-1, each `[sequences]`; a group of one keeps R_i.

    The group's minimum is subtracted first: the mean does not care, and equal rewards then give exact zeros where
    rounding of their mean would leave a tiny deviation that the division by a tiny std makes large.
    """
    _, groups = torch.unique(group_ids, return_inverse=True)
    num_groups = int(groups.max()) + 1 if groups.numel() else 0
    sizes = torch.bincount(groups, minlength=num_groups)
    lowest = rewards.new_zeros(num_groups).scatter_reduce(0, groups, rewards, reduce="amin", include_self=False)
    shifted = rewards - lowest[groups]
    mean = rewards.new_zeros(num_groups).index_add(0, groups, shifted) / sizes
    size = sizes[groups]
    return torch.where(size > 1, shifted - mean[groups], rewards), size, groups


def grpo(rewards: Tensor, group_ids: Tensor, *, norm_by_std: bool = True, epsilon: float = GRPO_EPSILON) -> Tensor:
    """Group-relative advantage: A_i = (R_i - mean_g) / (std_g + epsilon), std with n - 1 (arXiv 2402.03300, eq. 3).

    `norm_by_std=False` keeps A_i = R_i - mean_g, as in Dr.GRPO (arXiv 2503.20783). A group of one has no baseline:
    A = R, as in verl. Equal rewards give exactly 0. rewards, group_ids, result: `[sequences]`. epsilon is verl's;
    TRL uses 1e-4.
    """
    centered, size, groups = _center_by_group(rewards, group_ids)
    if not norm_by_std:
        return centered
    squares = torch.zeros_like(rewards).index_add(0, groups, centered.square())[groups]
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    return torch.where(size > 1, centered / (std + epsilon), centered)


def rloo(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Leave-one-out baseline: A_i = R_i - mean_{j != i} R_j = n/(n-1) (R_i - mean_g) (arXiv 2402.14740).

    A group of one: A = R. rewards, group_ids, result: `[sequences]`.
    """
    centered, size, _ = _center_by_group(rewards, group_ids)
    return centered * torch.where(size > 1, size / (size - 1).clamp(min=1), 1.0).to(rewards.dtype)


def reinforce(rewards: Tensor) -> Tensor:
    """No baseline: A_i = R_i (Williams 1992). `[sequences]`."""
    return rewards.clone()


def discounted_returns(token_rewards: Tensor, seq_ids: Tensor, gamma: float = 1.0) -> Tensor:
    """Return-to-go G_t = sum_{k >= t} gamma^(k-t) r_k within each sequence: `[tokens]`.

    A doubling scan: after the pass with stride s, each token holds the sum over the next 2s tokens. Powers of gamma
    stay below 1, so long sequences lose no precision (dividing a global cumulative sum by gamma^t would underflow).
    """
    returns = token_rewards.clone()
    longest = int(torch.bincount(seq_ids).max()) if seq_ids.numel() else 0
    stride = 1
    while stride < longest:
        same_sequence = seq_ids[stride:] == seq_ids[:-stride]
        ahead = keep(returns[stride:], same_sequence) * gamma**stride
        returns = torch.cat([returns[:-stride] + ahead, returns[-stride:]])
        stride *= 2
    return returns


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) with mean and unbiased variance (n - 1) over the valid tokens: `[tokens]`."""
    valid = values[mask.bool()]
    if valid.numel() < 2:
        raise DataError(f"Whitening needs at least 2 valid tokens in the batch, got {valid.numel()}.")
    return keep((values - valid.mean()) * torch.rsqrt(valid.var(correction=1) + WHITEN_EPSILON), mask)


def reinforce_plus_plus(token_rewards: Tensor, mask: Tensor, seq_ids: Tensor, *, gamma: float = 1.0) -> Tensor:
    """REINFORCE++: discounted returns-to-go, whitened over the batch (arXiv 2501.03262). `[tokens]`.

    Each token of the sequence is one time step, masked or not: a masked span does not cut later rewards off.
    """
    return whiten(discounted_returns(token_rewards, seq_ids, gamma), mask)


def reinforce_plus_plus_baseline(rewards: Tensor, group_ids: Tensor, mask: Tensor, seq_ids: Tensor) -> Tensor:
    """REINFORCE++-baseline: R_i - mean_g on each token, whitened over the batch (arXiv 2501.03262). `[tokens]`."""
    centered, _, _ = _center_by_group(rewards, group_ids)
    return whiten(centered[seq_ids], mask)


def _per_token(of_sequences: Callable[[AdvantageInputs], Tensor]) -> AdvantageEstimator:
    """An estimator from one that gives `[sequences]`: each valid token takes its sequence's value."""

    def estimate(batch: AdvantageInputs, /) -> Tensor:
        return keep(of_sequences(batch)[batch.seq_ids], batch.mask)

    return estimate


def _reinforce_plus_plus(batch: AdvantageInputs, /) -> Tensor:
    return reinforce_plus_plus(batch.token_rewards, batch.mask, batch.seq_ids, gamma=batch.gamma)


def _reinforce_plus_plus_baseline(batch: AdvantageInputs, /) -> Tensor:
    return reinforce_plus_plus_baseline(batch.summed_rewards(), batch.group_ids, batch.mask, batch.seq_ids)


ESTIMATORS: dict[str, AdvantageEstimator] = {
    "grpo": _per_token(lambda batch: grpo(batch.summed_rewards(), batch.group_ids, norm_by_std=batch.norm_by_std)),
    "rloo": _per_token(lambda batch: rloo(batch.summed_rewards(), batch.group_ids)),
    "reinforce": _per_token(lambda batch: reinforce(batch.summed_rewards())),
    "reinforcePlusPlus": _reinforce_plus_plus,
    "reinforcePlusPlusBaseline": _reinforce_plus_plus_baseline,
}


def checked(name: str, advantages: object, batch: AdvantageInputs) -> Tensor:
    """`advantages` as estimator `name` returned them, masked and detached; DataError if they cannot be trained on."""
    where = f"Advantage estimator '{name}'"
    if not isinstance(advantages, Tensor):
        raise DataError(f"{where} returned {type(advantages).__name__}; it must return a torch.Tensor [tokens].")
    if advantages.shape != batch.mask.shape:
        raise DataError(
            f"{where} returned shape {tuple(advantages.shape)}; it must return one value per token, "
            f"shape {tuple(batch.mask.shape)} (for values per sequence, return values[batch.seq_ids])."
        )
    if not advantages.is_floating_point():
        raise DataError(f"{where} returned dtype {advantages.dtype}; it must return floating-point values.")
    bad = (~torch.isfinite(advantages) & batch.mask.bool()).nonzero()
    if bad.numel():
        token = int(bad[0])
        raise DataError(
            f"{where} returned {advantages[token].item()} at token {token} (sequence {int(batch.seq_ids[token])}); "
            f"{bad.shape[0]} of {int(batch.mask.bool().sum())} valid tokens are not finite. Check the rewards."
        )
    return keep(advantages.detach(), batch.mask)
