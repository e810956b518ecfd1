"""What follows when processes end: a table of exit codes, and a budget of restarts."""

import pytest

from grpo_worker.exit_policy import LONGEST_BACKOFF_SECONDS, UNCOUNTED_LIMIT
from grpo_worker.local.policy import Action, Budget, Decision, decide

SUCCEED, YIELD, FAIL = Action.SUCCEED, Action.YIELD, Action.FAIL
ROLLOUT, SET = Action.RESTART_ROLLOUT, Action.RESTART_SET


@pytest.mark.parametrize(
    ("ended", "action", "culprit", "counted"),
    [
        # the coordinator's word ends the run
        ({"coordinator": 0}, SUCCEED, "coordinator", True),
        ({"coordinator": 80}, YIELD, "coordinator", True),
        ({"coordinator": 0, "trainer-0": -9}, SUCCEED, "coordinator", True),
        ({"rollout-0": 1, "coordinator": 0}, SUCCEED, "coordinator", True),
        ({"coordinator": 80, "trainer-0": 75}, YIELD, "coordinator", True),
        # no restart mends these
        ({"coordinator": 64}, FAIL, "coordinator", True),
        ({"coordinator": 65}, FAIL, "coordinator", True),
        ({"coordinator": 78}, FAIL, "coordinator", True),
        ({"coordinator": 81}, FAIL, "coordinator", True),
        ({"trainer-0": 65}, FAIL, "trainer-0", True),
        ({"rollout-1": 78}, FAIL, "rollout-1", True),
        ({"coordinator": 75, "trainer-0": 78}, FAIL, "trainer-0", True),
        ({"rollout-0": 1, "trainer-0": 65}, FAIL, "trainer-0", True),
        # an engine is replaced alone
        ({"rollout-0": 1}, ROLLOUT, "rollout-0", True),
        ({"rollout-0": -9}, ROLLOUT, "rollout-0", True),
        ({"rollout-1": 82}, ROLLOUT, "rollout-1", True),
        ({"rollout-1": 85}, ROLLOUT, "rollout-1", True),
        ({"rollout-1": 75}, ROLLOUT, "rollout-1", False),
        ({"rollout-0": -11, "rollout-1": -9}, ROLLOUT, "rollout-0", True),
        # coordinator and trainer hold one state
        ({"coordinator": -9}, SET, "coordinator", True),
        ({"coordinator": 1}, SET, "coordinator", True),
        ({"coordinator": 83}, SET, "coordinator", True),
        ({"coordinator": 82}, SET, "coordinator", True),
        ({"coordinator": 75}, SET, "coordinator", False),
        ({"trainer-0": -9}, SET, "trainer-0", True),
        ({"trainer-1": 85}, SET, "trainer-1", True),
        ({"trainer-0": 75}, SET, "trainer-0", False),
        ({"coordinator": 75, "trainer-0": 75}, SET, "coordinator", False),
        # the one that lost the other is not the one to blame
        ({"coordinator": 75, "trainer-0": -9}, SET, "trainer-0", True),
        ({"coordinator": 75, "trainer-0": 85}, SET, "trainer-0", True),
        ({"trainer-0": 75, "coordinator": -11}, SET, "coordinator", True),
        ({"coordinator": 75, "trainer-0": 75, "trainer-1": 1}, SET, "trainer-1", True),
        # an engine that ended with them is looked at afterwards
        ({"rollout-0": 1, "coordinator": 75, "trainer-0": -9}, SET, "trainer-0", True),
    ],
)  # fmt: skip
def test_what_follows_from_exit_codes(ended: dict[str, int], action: Action, culprit: str, counted: bool) -> None:
    decision = decide(ended)
    assert (decision.action, decision.culprit) == (action, culprit)
    if action in (ROLLOUT, SET):
        assert decision.counted is counted


COUNTED = Decision(SET, "trainer-0")
UNCOUNTED = Decision(SET, "trainer-0", counted=False)


def test_the_wait_doubles_up_to_its_limit() -> None:
    budget = Budget(max_restarts=8, backoff_seconds=2.0)
    waits = [budget.charge(COUNTED) for _ in range(8)]
    assert waits == [
        2.0,
        4.0,
        8.0,
        16.0,
        32.0,
        LONGEST_BACKOFF_SECONDS,
        LONGEST_BACKOFF_SECONDS,
        LONGEST_BACKOFF_SECONDS,
    ]


@pytest.mark.parametrize("restarts", [0, 1, 3])
def test_a_budget_is_used_up_after_its_restarts(restarts: int) -> None:
    budget = Budget(restarts, 0.0)
    assert [budget.charge(COUNTED) for _ in range(restarts + 1)] == [0.0] * restarts + [None]


def test_progress_gives_the_budget_back() -> None:
    budget = Budget(1, 1.0)
    assert budget.charge(COUNTED) == 1.0
    budget.progressed()
    assert budget.charge(COUNTED) == 1.0
    assert budget.charge(COUNTED) is None


def test_restarts_that_do_not_count_are_bounded_all_the_same() -> None:
    budget = Budget(0, 0.5)
    assert [budget.charge(UNCOUNTED) is None for _ in range(UNCOUNTED_LIMIT + 1)] == [False] * UNCOUNTED_LIMIT + [True]


def test_a_restart_that_does_not_count_leaves_the_budget() -> None:
    budget = Budget(1, 1.0)
    assert budget.charge(UNCOUNTED) == 1.0
    assert budget.charge(COUNTED) == 2.0
    assert budget.charge(COUNTED) is None
