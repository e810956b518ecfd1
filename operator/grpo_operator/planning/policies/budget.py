"""Restarts since the last progress: how many there may be, and how long each waits.

Invariant: a job that makes no progress fails after finitely many restarts, counted or not; one that makes progress never fails for
restarts that lie before it.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from grpo_operator import clock
from grpo_worker.config.run import FailurePolicy
from grpo_worker.config.status import Budget
from grpo_worker.exit_policy import UNCOUNTED_LIMIT, backoff_seconds

Scope = Literal["set", "rollout"]


@dataclass(frozen=True)
class Charge:
    """`budget` after a restart was charged to it; no restart follows when it is `exhausted`."""

    budget: Budget
    exhausted: bool


def charge(budget: Budget, scope: Scope, *, counted: bool, policy: FailurePolicy, now: datetime) -> Charge:
    """Charge one restart of coordinator and trainers (`set`), or one replacement of a rollout pod."""
    prefix = "rollout_" if scope == "rollout" else ""
    used = {name: getattr(budget, prefix + name) or 0 for name in ("counted", "uncounted")}
    used["counted" if counted else "uncounted"] += 1
    wait = backoff_seconds(policy.backoff_seconds, used["counted"] + used["uncounted"])
    changes: dict[str, object] = {prefix + name: number for name, number in used.items()}
    changes[f"{prefix}not_before"] = clock.text_after(now, wait)
    if scope == "rollout":
        changes["rollout_charged_time"] = clock.text(now)
    exhausted = used["counted"] > policy.max_restarts or used["uncounted"] > UNCOUNTED_LIMIT
    return Charge(budget.model_copy(update=changes), exhausted)


def same_failure(budget: Budget, pod_created: datetime) -> bool:
    """Whether the loss of a rollout pod is part of one already charged: engines that die together are one failure.

    A chain of failures cannot hide in this: the pod that replaces one is made after the charge.
    """
    charged = clock.parse(budget.rollout_charged_time)
    return charged is not None and pod_created < charged


def progressed(budget: Budget, step: int) -> Budget:
    """The budget once `step` is reached; a step beyond the last reset gives it back whole."""
    if budget.step is not None and step <= budget.step:
        return budget
    return renewed(budget).model_copy(update={"step": step})


def renewed(budget: Budget) -> Budget:
    """Nothing charged. The back-offs stay: what waits for one has been announced."""
    return budget.model_copy(update={"counted": 0, "uncounted": 0, "rollout_counted": 0, "rollout_uncounted": 0})
