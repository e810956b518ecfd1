"""The mathematics of the training step, as pure functions on tensors.

Invariant: nothing here knows a model, a process group, a file or the configuration (but for
the names of its choices, and how a correction is set); data is ragged and flat (`ragged`).

    shaping       rewards -> rewards: overlong penalty, dynamic sampling
    kl            log-probs -> KL per token, and its coefficient
    advantages    rewards -> advantage per token
    correction    rollout and trainer log-probs -> weights and mask
    losses        log-probs and advantages -> loss per token
    aggregation   losses per token -> the scalar for backward
"""

from grpo_worker.algorithms.advantages import (
    ESTIMATORS,
    AdvantageEstimator,
    AdvantageInputs,
    checked,
    outcome_rewards,
)
from grpo_worker.algorithms.aggregation import LossNormalizer, TotalLoss, aggregate, total_loss
from grpo_worker.algorithms.correction import CorrectionResult, Rejection, corrected, rollout_weights, weights_of_part
from grpo_worker.algorithms.kl import KLController, kl_penalty, make_kl_controller, penalize_rewards
from grpo_worker.algorithms.losses import (
    POLICY_LOSSES,
    PolicyLoss,
    PolicyLossInputs,
    PolicyLossOutput,
    aggregation_of,
)
from grpo_worker.algorithms.shaping import has_signal, overlong_penalty

__all__ = [
    "ESTIMATORS",
    "POLICY_LOSSES",
    "AdvantageEstimator",
    "AdvantageInputs",
    "CorrectionResult",
    "KLController",
    "LossNormalizer",
    "PolicyLoss",
    "PolicyLossInputs",
    "PolicyLossOutput",
    "Rejection",
    "TotalLoss",
    "aggregate",
    "aggregation_of",
    "checked",
    "corrected",
    "has_signal",
    "kl_penalty",
    "make_kl_controller",
    "outcome_rewards",
    "overlong_penalty",
    "penalize_rewards",
    "rollout_weights",
    "total_loss",
    "weights_of_part",
]
