"""Policy losses: one value per token, to be minimised.

Invariant: a loss returns `[tokens]` and never averages: `aggregation` alone divides, by global counts. Metrics are sums
over the valid tokens, so that they add over micro-batches and ranks; divided by the global token count they are verl's.
Log-probs are of the tempered distribution (logits / sampling temperature): the trainer divides, nothing here does.
Every registered loss, and a user's `module:function`, has the signature `PolicyLoss`.

With l = log pi, l_old = log pi_old and advantage A, the ratio of a token is r = exp(clamp(l - l_old, -20, 20)).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpo_worker.algorithms.ragged import keep, mean_by_sequence
from grpo_worker.config.actor import LossAggMode
from grpo_worker.errors import DataError, UsageError

LOG_RATIO_LIMIT = 20.0
SEQUENCE_LOG_RATIO_LIMIT = 10.0


@dataclass(frozen=True, slots=True)
class PolicyLossInputs:
    """One micro-batch, flat: log_probs (with gradient), old_log_probs, advantages, mask and seq_ids are `[tokens]`.

    The clip range of the ratio is [1 - clip_ratio_low, 1 + clip_ratio_high]; clip_ratio_c > 1 is the dual clip.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    seq_ids: Tensor
    num_seqs: int
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0

    def __post_init__(self) -> None:
        for name in ("old_log_probs", "advantages", "mask", "seq_ids"):
            shape, expected = tuple(getattr(self, name).shape), tuple(self.log_probs.shape)
            if shape != expected:
                raise DataError(f"PolicyLossInputs.{name}: shape {shape} differs from log_probs' {expected}.")
        if self.clip_ratio_c <= 1:
            raise UsageError(f"The dual clip clipRatioC must be greater than 1, got {self.clip_ratio_c}.")


@dataclass(frozen=True, slots=True)
class PolicyLossOutput:
    """loss `[tokens]`, zero where masked; metrics: detached scalars, sums over the valid tokens."""

    loss: Tensor
    metrics: dict[str, Tensor]


class PolicyLoss(Protocol):
    def __call__(self, inputs: PolicyLossInputs, /) -> PolicyLossOutput: ...


def _log_ratio(inputs: PolicyLossInputs) -> Tensor:
    return keep(inputs.log_probs - inputs.old_log_probs.detach(), inputs.mask)


def _metrics(
    inputs: PolicyLossInputs, log_ratio: Tensor, low: Tensor, high: Tensor, dual: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums over valid tokens. `low` and `high` mark tokens that the clip range cut at its lower and upper end."""
    low, high = (keep(marked.to(log_ratio.dtype), inputs.mask).sum().detach() for marked in (low, high))
    lower = torch.zeros_like(low) if dual is None else keep(dual.to(log_ratio.dtype), inputs.mask).sum().detach()
    return {
        "pg_clipfrac": low + high,
        "pg_clipfrac_lower": lower,  # verl's name for the dual clip
        "clip_ratio/low_mean": low,  # TRL's names for the two ends of the clip
        "clip_ratio/high_mean": high,
        "ppo_kl": -keep(log_ratio, inputs.mask).sum().detach(),
    }


def _clipped(inputs: PolicyLossInputs, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A r, -A clip(r)), and the tokens where the clip took over at its lower (A < 0) and upper (A > 0) end."""
    advantages = inputs.advantages
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - inputs.clip_ratio_low, 1 + inputs.clip_ratio_high)
    took_over = clipped > unclipped
    return torch.maximum(unclipped, clipped), took_over & (advantages < 0), took_over & (advantages > 0)


def vanilla(inputs: PolicyLossInputs, /) -> PolicyLossOutput:
    """PPO clip (arXiv 1707.06347), ends apart as in DAPO (arXiv 2503.14476), dual clip where A < 0 (arXiv 1912.09729).

    L = max(-A r, -A clip(r, 1 - low, 1 + high)); where A < 0: L = min(L, -A c).
    """
    log_ratio = _log_ratio(inputs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    loss, low, high = _clipped(inputs, log_ratio.exp())
    bound = -inputs.advantages * inputs.clip_ratio_c
    negative = inputs.advantages < 0
    dual = negative & (loss > bound)
    loss = torch.where(negative, torch.minimum(loss, bound), loss)
    return PolicyLossOutput(keep(loss, inputs.mask), _metrics(inputs, log_ratio, low, high, dual))


def gspo(inputs: PolicyLossInputs, /) -> PolicyLossOutput:
    """GSPO (arXiv 2507.18071): the ratio of a sequence is the geometric mean of its tokens' ratios.

    log s_i = mean_t(l - l_old); token form (eq. 14) log s_{i,t} = l - sg(l) + sg(log s_i), at most 10; then the PPO
    clip. Each token's ratio has the value of s_i and its own gradient. Aggregated as seq-mean-token-mean
    (`aggregation_of`) this is the sequence objective: d/dl_t = -A s_i / |y_i|. Needs whole sequences in a micro-batch.
    Its clip range is about 3e-4 and 4e-4, not 0.2: the ratio is a mean over the sequence.
    """
    log_ratio = _log_ratio(inputs)
    of_sequence = mean_by_sequence(log_ratio.detach(), inputs.mask, inputs.seq_ids, inputs.num_seqs)
    straight_through = keep(inputs.log_probs - inputs.log_probs.detach(), inputs.mask)
    log_sequence_ratio = (straight_through + of_sequence[inputs.seq_ids]).clamp(max=SEQUENCE_LOG_RATIO_LIMIT)
    loss, low, high = _clipped(inputs, log_sequence_ratio.exp())
    return PolicyLossOutput(keep(loss, inputs.mask), _metrics(inputs, log_ratio, low, high))


def cispo(inputs: PolicyLossInputs, /) -> PolicyLossOutput:
    """CISPO (arXiv 2506.13585, eq. 4): L = -sg(clip(r, 1 - low, 1 + high)) A l. Clipped tokens keep their gradient.

    Both ends are clamped around 1, as in verl. TRL clamps only above, and at clip_ratio_high itself (5.0, not 1.2):
    to get that, set clip_ratio_low = 1 and clip_ratio_high = cap - 1.
    """
    log_ratio = _log_ratio(inputs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.detach().exp()
    lowest, highest = 1 - inputs.clip_ratio_low, 1 + inputs.clip_ratio_high
    loss = -ratio.clamp(lowest, highest) * inputs.advantages * keep(inputs.log_probs, inputs.mask)
    return PolicyLossOutput(keep(loss, inputs.mask), _metrics(inputs, log_ratio, ratio < lowest, ratio > highest))


POLICY_LOSSES: dict[str, PolicyLoss] = {"vanilla": vanilla, "gspo": gspo, "cispo": cispo}


def aggregation_of(loss_mode: str, loss_agg_mode: LossAggMode) -> LossAggMode:
    """How the policy loss is aggregated: as configured, except GSPO, which is defined as seq-mean-token-mean."""
    return "seq-mean-token-mean" if loss_mode == "gspo" else loss_agg_mode
