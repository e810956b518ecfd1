"""From losses per token to the scalar whose gradient is taken.

Invariant: every denominator is a count over the whole mini-batch and all ranks, known before the first backward. So the
sum of `aggregate` over any split of the mini-batch into micro-batches and ranks is the value, and the gradient, of the
mini-batch in one piece: micro-batch size, packing, accumulation and world size change nothing. A sequence must not be
split (seq-mean-token-mean needs its length). Gradients of the ranks must be summed, not averaged.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_worker.algorithms.ragged import keep, mean_by_sequence
from grpo_worker.config.actor import LossAggMode
from grpo_worker.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class LossNormalizer:
    """The denominators of one optimizer step.

    global_tokens: valid tokens, and global_seqs: sequences with at least one, of the whole mini-batch over all ranks.
    max_response_tokens: the constant of seq-mean-token-sum-norm; data.maxResponseLength, never a padded width, which would drift with the
    longest response at hand.
    """

    mode: LossAggMode
    global_tokens: int
    global_seqs: int
    max_response_tokens: int


@dataclass(frozen=True, slots=True)
class TotalLoss:
    """`total` is for backward; the parts are detached, before their coefficients, and add over micro-batches."""

    total: Tensor
    policy: Tensor
    kl: Tensor
    entropy: Tensor


def aggregate(loss: Tensor, mask: Tensor, seq_ids: Tensor, num_seqs: int, normalizer: LossNormalizer) -> Tensor:
    """This micro-batch's share of the mini-batch loss, a scalar. loss, mask, seq_ids: `[tokens]`.

    Sums are over valid tokens.

    token-mean: sum / N_tokens (DAPO, arXiv 2503.14476).
    token-sum: sum.
    seq-mean-token-sum: sum / N_seqs.
    seq-mean-token-sum-norm: sum / (N_seqs * max_response_tokens) (Dr.GRPO, arXiv 2503.20783).
    seq-mean-token-mean: sum_i mean_t / N_seqs (GRPO, arXiv 2402.03300).
    Fully masked sequences are in no sum and in no count; if all are, the loss is 0.
    """
    if loss.shape != mask.shape or loss.shape != seq_ids.shape:
        raise DataError(
            f"The loss has shape {tuple(loss.shape)}, mask {tuple(mask.shape)}, seq_ids {tuple(seq_ids.shape)}: "
            "a policy loss must return one value per token."
        )
    num_tokens, num_sequences = max(normalizer.global_tokens, 1), max(normalizer.global_seqs, 1)
    match normalizer.mode:
        case "token-mean":
            return keep(loss, mask).sum() / num_tokens
        case "token-sum":
            return keep(loss, mask).sum()
        case "seq-mean-token-sum":
            return keep(loss, mask).sum() / num_sequences
        case "seq-mean-token-sum-norm":
            return keep(loss, mask).sum() / (num_sequences * normalizer.max_response_tokens)
        case "seq-mean-token-mean":
            return mean_by_sequence(loss, mask, seq_ids, num_seqs).sum() / num_sequences
    raise UsageError(f"Unknown loss aggregation '{normalizer.mode}'.")


def total_loss(
    policy_loss: Tensor,
    mask: Tensor,
    seq_ids: Tensor,
    num_seqs: int,
    normalizer: LossNormalizer,
    *,
    policy_mode: LossAggMode | None = None,
    is_weights: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> TotalLoss:
    """agg(policy_loss * is_weights) + kl_coef * agg(kl) - entropy_coef * agg(entropy).

    is_weights `[tokens]` (rollout correction) weigh the policy term alone, as in verl: KL and entropy are of the
    current policy. policy_mode replaces the mode for the policy term (`losses.aggregation_of`). All tensors are
    `[tokens]`.
    """

    def share(values: Tensor, using: LossNormalizer = normalizer) -> Tensor:
        return aggregate(values, mask, seq_ids, num_seqs, using)

    weighted = policy_loss if is_weights is None else policy_loss * is_weights.detach()
    policy = share(weighted, replace(normalizer, mode=policy_mode or normalizer.mode))
    total, zero = policy, torch.zeros_like(policy).detach()
    kl_share, entropy_share = zero, zero
    if kl is not None:
        kl_share = share(kl)
        total = total + kl_coef * kl_share
    if entropy is not None:
        entropy_share = share(entropy)
        # A term that is off must not drag the entropy's graph, the costliest of all, through backward.
        total = total - entropy_coef * entropy_share if entropy_coef else total
    return TotalLoss(total, policy.detach(), kl_share.detach(), entropy_share.detach())
