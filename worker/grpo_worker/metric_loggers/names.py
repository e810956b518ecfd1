"""Which metric of metrics.jsonl a person means by "reward", "accuracy" or "KL".

Invariant: console, live view and report look the names up here, so the same word shows the same number everywhere.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

REWARD = ("critic/score/mean", "critic/rewards/mean")
VALIDATION_ACCURACY = ("val/accuracy/pass@1",)
VALIDATION_SCORE = ("val/score/pass@1",)  # where the reward function gives no accuracy
TRAIN_ACCURACY = ("critic/accuracy/mean", "train/accuracy", "train/accuracy/mean")
RESPONSE_LENGTH = ("response_length/mean",)
# KL to the reference model when a KL term is on, else KL between the old and the new policy.
KL = ("actor/kl_loss", "actor/reward_kl_penalty", "actor/ppo_kl")
TOKENS_PER_SECOND = ("perf/throughput",)
STEP_SECONDS = ("timing_s/step", "perf/time_per_step")
STALENESS_MEAN = ("training/off_policy/trajectory_staleness/mean", "staleness/mean")
STALENESS_MAX = ("training/off_policy/trajectory_staleness/max", "staleness/max")

# Parts of a step in the order in which they run.
STEP_PARTS = (
    "gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "update_weights", "save_checkpoint", "testing",
)  # fmt: skip


def finite(value: Any) -> float | None:
    """The value as a float, or None for everything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def first_of(metrics: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """The first of `names` that has a finite value."""
    for name in names:
        if (value := finite(metrics.get(name))) is not None:
            return value
    return None
