"""Restarts without progress: counted, bounded, further and further apart."""

from datetime import timedelta

import pytest
from plan_world import START

from grpo_operator import clock
from grpo_operator.planning.policies.budget import Scope, charge, progressed, renewed, same_failure
from grpo_worker.config.run import FailurePolicy
from grpo_worker.config.status import Budget
from grpo_worker.exit_policy import LONGEST_BACKOFF_SECONDS, UNCOUNTED_LIMIT

POLICY = FailurePolicy(maxRestarts=2, backoffSeconds=4.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("scope", "counted", "before", "after", "wait", "exhausted"),
    [
        ("set", True, Budget(), Budget(counted=1, uncounted=0), 4, False),
        ("set", True, Budget(counted=1, uncounted=1), Budget(counted=2, uncounted=1), 16, False),
        ("set", True, Budget(counted=2), Budget(counted=3, uncounted=0), 16, True),
        ("set", False, Budget(counted=2), Budget(counted=2, uncounted=1), 16, False),
        ("set", False, Budget(uncounted=UNCOUNTED_LIMIT - 1), Budget(counted=0, uncounted=UNCOUNTED_LIMIT), LONGEST_BACKOFF_SECONDS, False),
        ("set", False, Budget(uncounted=UNCOUNTED_LIMIT), Budget(counted=0, uncounted=UNCOUNTED_LIMIT + 1), LONGEST_BACKOFF_SECONDS, True),
        ("rollout", True, Budget(counted=9), Budget(counted=9, rollout_counted=1, rollout_uncounted=0), 4, False),
        ("rollout", True, Budget(rollout_counted=2), Budget(rollout_counted=3, rollout_uncounted=0), 16, True),
    ],
)  # fmt: skip
def test_a_charge(scope: Scope, counted: bool, before: Budget, after: Budget, wait: float, exhausted: bool) -> None:
    result = charge(before, scope, counted=counted, policy=POLICY, now=START)
    when = clock.text(START + timedelta(seconds=wait))
    limits = (
        {"not_before": when}
        if scope == "set"
        else {"rollout_not_before": when, "rollout_charged_time": clock.text(START)}
    )
    assert (result.budget, result.exhausted) == (after.model_copy(update=limits), exhausted)


def test_no_back_off_is_no_wait() -> None:
    result = charge(Budget(), "set", counted=True, policy=FailurePolicy(backoffSeconds=0.0), now=START)  # type: ignore[call-arg]
    assert result.budget.not_before == clock.text(START)


@pytest.mark.parametrize(("step", "counted"), [(4, 2), (5, 2), (6, 0)])
def test_only_a_step_beyond_the_best_is_progress(step: int, counted: int) -> None:
    budget = progressed(Budget(counted=2, rollout_counted=1, step=5), step)
    assert (budget.counted, budget.step) == (counted, max(step, 5))


def test_renewing_keeps_the_back_off_and_the_step() -> None:
    budget = renewed(Budget(counted=2, uncounted=1, rollout_counted=1, step=5, not_before="2026-11-22T12:00:00Z"))
    assert (budget.counted, budget.uncounted, budget.rollout_counted, budget.step) == (0, 0, 0, 5)
    assert budget.not_before


@pytest.mark.parametrize(("made_seconds", "same"), [(-1, True), (0, False), (1, False)])
def test_pods_made_before_the_last_charge_belong_to_its_failure(made_seconds: int, same: bool) -> None:
    budget = Budget(rollout_charged_time=clock.text(START))
    assert same_failure(budget, START + timedelta(seconds=made_seconds)) is same
    assert not same_failure(Budget(), START)
