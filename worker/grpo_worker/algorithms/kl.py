"""KL divergence from the reference policy: per-token estimators and the coefficient that weighs them.

Invariant: every estimator sees only the log-probs of the sampled tokens, and estimates KL(pi || pi_ref) for tokens
drawn from pi (J. Schulman, http://joschu.net/blog/kl-approx.html). A controller's state is plain numbers, saved with
the run.
"""

from typing import Protocol, get_args

import torch
from torch import Tensor

from grpo_worker.algorithms.ragged import count_by_sequence, keep, mean_by_sequence
from grpo_worker.config.algorithm import KLControllerType, KLKind
from grpo_worker.errors import UsageError

LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0
PROPORTIONAL_ERROR_LIMIT = 0.2


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, kind: KLKind) -> Tensor:
    """KL estimate of each token, `[tokens]`. With d = log pi - log pi_ref:

    k1 = kl: d. Unbiased, high variance, of either sign.
    abs: |d|.
    k2 = mse: d^2 / 2. Biased value; its gradient is the unbiased one.
    k3 = low_var_kl: e^(-d) + d - 1. Unbiased, never negative; -d is clamped to +-20 and the result to +-10, so the
    gradient is zero beyond.
    A trailing '+' (`k3+`): the value as named, the gradient of k2, straight-through.
    """
    if kind not in get_args(KLKind):
        raise UsageError(f"Unknown KL estimator '{kind}'. Choose one of: {', '.join(get_args(KLKind))}.")
    difference = log_probs - ref_log_probs
    k2 = 0.5 * difference.square()
    match kind.removesuffix("+"):
        case "k1" | "kl":
            value = difference
        case "abs":
            value = difference.abs()
        case "k2" | "mse":
            return k2
        case _:
            negative = (-difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            value = (torch.expm1(negative) - negative).clamp(-K3_LIMIT, K3_LIMIT)
    return value.detach() + (k2 - k2.detach()) if kind.endswith("+") else value


def penalize_rewards(
    token_rewards: Tensor, kl: Tensor, mask: Tensor, seq_ids: Tensor, num_seqs: int, coefficient: float
) -> tuple[Tensor, float]:
    """KL in the reward: (token_rewards - coefficient * kl on valid tokens `[tokens]`, the batch's KL).

    The batch's KL, which drives the controller, is the mean over sequences of their mean over tokens, as in verl;
    fully masked sequences are left out.
    """
    means = mean_by_sequence(kl, mask, seq_ids, num_seqs)
    valid = count_by_sequence(mask, seq_ids, num_seqs) > 0
    batch_kl = float(means[valid].mean()) if bool(valid.any()) else 0.0
    return token_rewards - coefficient * keep(kl, mask), batch_kl


class KLController(Protocol):
    """Holds the KL coefficient of the reward penalty; `update` once a step, after the penalty was applied."""

    coefficient: float

    def update(self, current_kl: float, num_seqs: int) -> None: ...
    def state_dict(self) -> dict[str, float]: ...
    def load_state_dict(self, state: dict[str, float]) -> None: ...


class FixedKLController:
    """The coefficient never changes: the one of the document holds, also after a resume."""

    def __init__(self, kl_coef: float) -> None:
        self.coefficient = kl_coef

    def update(self, current_kl: float, num_seqs: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to restore."""


class AdaptiveKLController:
    """Proportional control towards target_kl (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    coefficient *= 1 + clip(kl / target_kl - 1, -0.2, 0.2) * num_seqs / horizon, horizon in sequences.
    """

    def __init__(self, kl_coef: float, *, horizon: float, target_kl: float) -> None:
        if horizon <= 0 or target_kl <= 0:
            raise UsageError(
                f"An adaptive KL controller needs horizon > 0 and target_kl > 0, got {horizon}, {target_kl}."
            )
        self.coefficient = kl_coef
        self.horizon = horizon
        self.target_kl = target_kl

    def update(self, current_kl: float, num_seqs: int) -> None:
        error = current_kl / self.target_kl - 1
        error = max(-PROPORTIONAL_ERROR_LIMIT, min(PROPORTIONAL_ERROR_LIMIT, error))
        self.coefficient *= 1 + error * num_seqs / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state.get("coefficient", self.coefficient)  # none: the run had a fixed one


def make_kl_controller(
    controller_type: KLControllerType, kl_coef: float, *, horizon: float = 10_000, target_kl: float = 0.1
) -> KLController:
    """The controller of `algorithm.klCtrl`."""
    if controller_type == "adaptive":
        return AdaptiveKLController(kl_coef, horizon=horizon, target_kl=target_kl)
    if controller_type == "fixed":
        return FixedKLController(kl_coef)
    raise UsageError(f"Unknown KL controller '{controller_type}'. Choose one of: fixed, adaptive.")
