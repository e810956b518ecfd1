"""Rollout correction: the sampler's distribution is not the trainer's, even for the same weights.

Invariant: with mu the rollout's log-probs and old the trainer's, both of the same tempered distribution, everything
follows from the log-ratio d = old - mu of each token. Weights carry no gradient and multiply the policy loss alone. A
weight of 0 (IcePop) leaves the token in the denominators; a rejected token leaves the mask, so the denominators too.
Called once with the whole batch: batch normalisation and metrics are of the batch.

Sources: truncated importance sampling https://fengyao.notion.site/off-policy-rl; IcePop arXiv 2510.18855; rejection
criteria and metric names as in verl's rollout correction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from grpo_worker.algorithms.ragged import (
    count_by_sequence,
    keep,
    max_by_sequence,
    mean_by_sequence,
    sum_by_sequence,
)
from grpo_worker.config.algorithm import CorrectionLevel, RejectionCriterion, RolloutCorrection
from grpo_worker.errors import DataError, UsageError

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True, slots=True)
class Rejection:
    """Masks tokens (`token_*`) or whole sequences (`seq_*`) whose divergence is out of bounds.

    With d = old - mu clamped to +-20: k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d, taken per token, or as sum, mean or
    maximum over the sequence. k2 and k3 are bounded above by `upper`. k1 has a sign: its bounds are ratios,
    log(lower) <= k1 <= log(upper), lower = 1 / upper by default (`seq_mean_k1` bounds the geometric mean).
    """

    kind: RejectionCriterion
    upper: float
    lower: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(RejectionCriterion):
            raise UsageError(
                f"Unknown rejection '{self.kind}'. Choose from: {', '.join(get_args(RejectionCriterion))}."
            )
        if self.upper <= 0 or (self.kind.endswith("k1") and not 0 < (self.lower or 1 / self.upper) < self.upper):
            raise UsageError(
                f"Rejection '{self.kind}': bounds must satisfy 0 < lower < upper (lower is 1 / upper by default), "
                f"got lower {self.lower}, upper {self.upper}."
            )
        if self.lower is not None and not self.kind.endswith("k1"):
            raise UsageError(f"Rejection '{self.kind}' is never negative and takes no lower bound, got {self.lower}.")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of the statistic that is kept."""
        if self.kind.endswith("k1"):
            return math.log(self.lower or 1 / self.upper), math.log(self.upper)
        return -math.inf, self.upper


@dataclass(frozen=True, slots=True)
class CorrectionResult:
    """weights `[tokens]`: detached, 0 where the given mask was unset. mask `[tokens]`: after rejection, given dtype."""

    weights: Tensor
    mask: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Batch:
    log_ratio: Tensor
    mask: Tensor
    seq_ids: Tensor
    num_seqs: int
    valid_seqs: Tensor

    @classmethod
    def of(cls, log_ratio: Tensor, mask: Tensor, seq_ids: Tensor, num_seqs: int) -> "_Batch":
        valid = count_by_sequence(mask, seq_ids, num_seqs) > 0
        return cls(keep(log_ratio, mask), mask.bool(), seq_ids, num_seqs, valid)

    def by_sequence(self, how: str, values: Tensor) -> Tensor:
        """Sum, mean or max over the valid tokens of each sequence: `[sequences]`."""
        reduce = {"sum": sum_by_sequence, "mean": mean_by_sequence, "max": max_by_sequence}[how]
        return reduce(values, self.mask, self.seq_ids, self.num_seqs)


@torch.no_grad()
def rollout_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    seq_ids: Tensor,
    num_seqs: int,
    *,
    level: CorrectionLevel = "token",
    threshold: float | tuple[float, float] = 2.0,
    batch_normalize: bool = False,
    rejections: Sequence[Rejection] = (),
) -> CorrectionResult:
    """Weights rho = pi_old / mu, the mask after rejection, and the metrics of the mismatch. Inputs `[tokens]`.

    level: `token` rho_t = exp(d_t), `sequence` rho = exp(sum_t d_t) on each token of it, `none` all 1; exponents
    clamped to +-20. threshold: one number C truncates, min(rho, C) (TIS); a pair (low, high) zeroes rho outside it
    (IcePop). batch_normalize: divides by the mean weight, over tokens (`token`) or over sequences (`sequence`).
    rejections: all must pass.
    """
    for name, tensor in (("rollout_log_probs", rollout_log_probs), ("mask", mask), ("seq_ids", seq_ids)):
        if tensor.shape != old_log_probs.shape:
            raise DataError(
                f"{name} has shape {tuple(tensor.shape)}, old_log_probs {tuple(old_log_probs.shape)}; want [tokens]."
            )
    batch = _Batch.of(old_log_probs - rollout_log_probs, mask, seq_ids, num_seqs)
    if not bool(batch.valid_seqs.any()):
        return CorrectionResult(torch.zeros_like(old_log_probs), mask.clone(), {})
    weights, weight_metrics = _importance_weights(batch, level, threshold, batch_normalize)
    kept, rejection_metrics = _reject(batch, rejections)
    corrections = _mismatch(batch, old_log_probs, rollout_log_probs) | weight_metrics | rejection_metrics
    metrics = {f"rollout_corr/{name}": value for name, value in corrections.items()}
    metrics |= {
        f"training/{name}": value for name, value in _differences(batch, old_log_probs, rollout_log_probs).items()
    }
    return CorrectionResult(weights, mask * kept.to(mask.dtype), metrics)


def corrected(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    seq_ids: Tensor,
    num_seqs: int,
    options: RolloutCorrection,
) -> CorrectionResult:
    """`rollout_weights` with what the document says. Where nothing is made of the engine's log-probs they may be NaN: the metrics are of
    the sequences that have them, whose number is one of them."""
    lower = options.rollout_rs_lower_threshold
    known = mask.bool() & ~rollout_log_probs.isnan()
    if not options.reads_engine and bool((known != mask.bool()).any()):
        seen = rollout_weights(old_log_probs, rollout_log_probs, known, seq_ids, num_seqs, level="none").metrics
        sequences = float((count_by_sequence(known, seq_ids, num_seqs) > 0).sum())
        return CorrectionResult(
            mask.to(old_log_probs.dtype), mask, seen | {"training/rollout_log_probs_sequences": sequences}
        )
    return rollout_weights(
        old_log_probs,
        rollout_log_probs,
        mask,
        seq_ids,
        num_seqs,
        level=options.rollout_is,
        threshold=_threshold(options),
        batch_normalize=options.rollout_is_batch_normalize,
        rejections=[
            Rejection(kind, options.rollout_rs_threshold, lower if kind.endswith("k1") else None)
            for kind in options.rollout_rs
        ],
    )


@torch.no_grad()
def weights_of_part(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    seq_ids: Tensor,
    num_seqs: int,
    options: RolloutCorrection,
) -> Tensor | None:
    """The weights that `corrected` gives these whole sequences of a batch, `[tokens]`, without a look at the others; None: all 1.
    Nothing here waits for the device. For documents without rejection and batch normalisation, which look at the batch."""
    assert options.of_each_sequence
    if options.rollout_is == "none":
        return None
    batch = _Batch.of(old_log_probs - rollout_log_probs, mask, seq_ids, num_seqs)
    return _ratios(batch, options.rollout_is, _threshold(options))[1]


def _threshold(options: RolloutCorrection) -> float | tuple[float, float]:
    low, high = options.rollout_is_lower_threshold, options.rollout_is_threshold
    return high if low is None else (low, high)


def _bounds(threshold: float | tuple[float, float]) -> tuple[float, float]:
    low, high = threshold if isinstance(threshold, tuple) else (0.0, threshold)
    if not 0 <= low < high:
        raise UsageError(f"The importance weight threshold must be C > 0 or 0 <= low < high, got {threshold}.")
    return low, high


def _ratios(batch: _Batch, level: CorrectionLevel, threshold: float | tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Ratios before and after the threshold, `[tokens]`."""
    low, high = _bounds(threshold)
    match level:
        case "token":
            exponent = batch.log_ratio
        case "sequence":
            exponent = batch.by_sequence("sum", batch.log_ratio)[batch.seq_ids]
        case _:
            raise UsageError(
                f"Unknown correction level '{level}'. Choose one of: {', '.join(get_args(CorrectionLevel))}."
            )
    raw = exponent.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    inside = (raw >= low) & (raw <= high)
    return raw, keep(keep(raw, inside) if isinstance(threshold, tuple) else raw.clamp(max=high), batch.mask)


def _importance_weights(
    batch: _Batch, level: CorrectionLevel, threshold: float | tuple[float, float], batch_normalize: bool
) -> tuple[Tensor, dict[str, float]]:
    """Weights `[tokens]` and `rollout_is_*`: mean, max, min and fractions are of the raw ratios, before the threshold;
    fraction_low is below `low`, or 1 / C as in verl;
    std and effective sample size, 1 / mean((w / mean w)^2), are of the weights that the loss uses."""
    low, high = _bounds(threshold)
    if level == "none":
        return batch.mask.to(batch.log_ratio.dtype), {}
    raw, used = _ratios(batch, level, threshold)
    # A sequence's weight counts once, however long it is.
    of_raw, of_used = raw[batch.mask], used[batch.mask]
    if level == "sequence":
        of_raw = batch.by_sequence("mean", raw)[batch.valid_seqs]
        of_used = batch.by_sequence("mean", used)[batch.valid_seqs]
    mean = of_used.mean()
    metrics = {
        "rollout_is_mean": of_raw.mean(),
        "rollout_is_max": of_raw.max(),
        "rollout_is_min": of_raw.min(),
        "rollout_is_ratio_fraction_high": (of_raw > high).double().mean(),
        "rollout_is_ratio_fraction_low": (of_raw < (low or 1 / high)).double().mean(),
        "rollout_is_std": of_used.std(correction=0),
        "rollout_is_eff_sample_size": mean.square() / of_used.square().mean().clamp(min=torch.finfo(mean.dtype).tiny),
    }
    if batch_normalize:
        factor = torch.where(mean > 0, mean, torch.ones_like(mean))
        used = used / factor
        metrics["rollout_is_batch_norm_factor"] = factor
    return used, _as_floats(metrics)


def _reject(batch: _Batch, rejections: Sequence[Rejection]) -> tuple[Tensor, dict[str, float]]:
    """Kept valid tokens, bool `[tokens]`, and `rollout_rs_*`, in total and for each criterion."""
    kept = batch.mask
    metrics: dict[str, Tensor] = {}
    for rejection in rejections:
        scope, _, estimator = rejection.kind.rpartition("_")
        divergence = _divergence(batch.log_ratio, estimator)
        low, high = rejection.bounds
        if scope == "token":
            statistic, per_token = divergence[batch.mask], divergence
        else:
            of_sequences = batch.by_sequence(scope.removeprefix("seq_"), divergence)
            statistic, per_token = of_sequences[batch.valid_seqs], of_sequences[batch.seq_ids]
        passed = (per_token >= low) & (per_token <= high) & batch.mask
        kept = kept & passed
        metrics |= {
            f"rollout_rs_{rejection.kind}_mean": statistic.mean(),
            f"rollout_rs_{rejection.kind}_max": statistic.max(),
            f"rollout_rs_{rejection.kind}_min": statistic.min(),
            f"rollout_rs_{rejection.kind}_fraction_high": (statistic > high).double().mean(),
            f"rollout_rs_{rejection.kind}_fraction_low": (statistic < low).double().mean(),
        } | _masked_fractions(batch, passed, f"rollout_rs_{rejection.kind}")
    if rejections:
        metrics |= _masked_fractions(batch, kept, "rollout_rs")
    return kept, _as_floats(metrics)


def _divergence(log_ratio: Tensor, estimator: str) -> Tensor:
    """k1, k2 or k3 of KL(mu || old) for tokens drawn from mu: `[tokens]`."""
    d = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return {"k1": -d, "k2": 0.5 * d.square(), "k3": torch.expm1(d) - d}[estimator]


def _masked_fractions(batch: _Batch, passed: Tensor, prefix: str) -> dict[str, Tensor]:
    """Share of the valid tokens that did not pass, and of the sequences that lost at least one."""
    failed = (batch.mask & ~passed).double()
    return {
        f"{prefix}_masked_fraction": failed[batch.mask].mean(),
        f"{prefix}_seq_masked_fraction": (batch.by_sequence("sum", failed)[batch.valid_seqs] > 0).double().mean(),
    }


def _mismatch(batch: _Batch, old_log_probs: Tensor, rollout_log_probs: Tensor) -> dict[str, float]:
    """How far apart the two policies are. Perplexities and log_ppl_* are per sequence, then averaged over sequences."""
    training = batch.by_sequence("mean", old_log_probs)[batch.valid_seqs]
    rollout = batch.by_sequence("mean", rollout_log_probs)[batch.valid_seqs]
    log_ppl_diff = rollout - training
    d = batch.log_ratio[batch.mask]
    d_seq = batch.by_sequence("sum", batch.log_ratio)[batch.valid_seqs].clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return _as_floats(
        {
            "kl": -d.mean(),  # KL(mu || old), k1
            "k3_kl": _divergence(d, "k3").mean(),
            "training_ppl": (-training).clamp(max=LOG_RATIO_LIMIT).exp().mean(),
            "training_log_ppl": -training.mean(),
            "rollout_ppl": (-rollout).clamp(max=LOG_RATIO_LIMIT).exp().mean(),
            "rollout_log_ppl": -rollout.mean(),
            "log_ppl_diff": log_ppl_diff.mean(),
            "log_ppl_abs_diff": log_ppl_diff.abs().mean(),
            "log_ppl_diff_max": log_ppl_diff.max(),
            "log_ppl_diff_min": log_ppl_diff.min(),
            "ppl_ratio": log_ppl_diff.clamp(max=LOG_RATIO_LIMIT).exp().mean(),
            "chi2_token": (2 * d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)).exp().mean() - 1,
            "chi2_seq": (2 * d_seq).exp().mean() - 1,
        }
    )


def _differences(batch: _Batch, old_log_probs: Tensor, rollout_log_probs: Tensor) -> dict[str, float]:
    """Differences of probabilities and of log-probs over valid tokens, and the probabilities' Pearson correlation
    (arXiv 2506.13585), which is left out where it is undefined: fewer than 2 tokens, or a constant."""
    actor, rollout = old_log_probs[batch.mask].exp(), rollout_log_probs[batch.mask].exp()
    difference = (actor - rollout).abs()
    log_difference = batch.log_ratio[batch.mask].abs()
    metrics = {
        "rollout_probs_diff_mean": difference.mean(),
        "rollout_probs_diff_max": difference.max(),
        "rollout_probs_diff_std": difference.std() if difference.numel() > 1 else torch.zeros_like(difference[0]),
        "rollout_logprobs_abs_diff_mean": log_difference.mean(),
        "rollout_logprobs_abs_diff_max": log_difference.max(),
    }
    a, b = actor - actor.mean(), rollout - rollout.mean()
    scale = a.norm() * b.norm()
    if float(scale) > 0:
        metrics["rollout_actor_probs_pearson_corr"] = (a * b).sum() / scale
    return _as_floats(metrics)


def _as_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """One copy from the device for all of them."""
    if not metrics:
        return {}
    values: list[float] = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
