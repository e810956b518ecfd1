"""The table of exit codes that the local supervisor and the operator share."""

import pytest

from grpo_worker.exit_policy import LONGEST_BACKOFF_SECONDS, Verdict, backoff_seconds, explanation_rank, killed, verdict


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (0, Verdict.DONE),
        (64, Verdict.FAIL),
        (65, Verdict.FAIL),
        (78, Verdict.FAIL),
        (81, Verdict.FAIL),
        (75, Verdict.RESTART_FREE),
        (80, Verdict.YIELD),
        (85, Verdict.RESTART_ELSEWHERE),
        (70, Verdict.RESTART),
        (82, Verdict.RESTART),
        (83, Verdict.RESTART),
        (84, Verdict.RESTART),
        (1, Verdict.RESTART),
        (137, Verdict.RESTART),
        (143, Verdict.RESTART),
        (-9, Verdict.RESTART),
    ],
)
def test_what_an_exit_code_calls_for(code: int, wanted: Verdict) -> None:
    assert verdict(code) is wanted


def test_the_best_explanation_comes_first() -> None:
    assert sorted([75, 82, 85, 84, 137, 65], key=explanation_rank) == [65, 137, 84, 85, 82, 75]
    assert explanation_rank(-9) == explanation_rank(137) and explanation_rank(0) == explanation_rank(
        80
    ) == explanation_rank(75)


@pytest.mark.parametrize(
    ("code", "by_signal"), [(-9, True), (137, True), (143, True), (128, False), (1, False), (0, False)]
)
def test_which_ends_are_a_signal(code: int, by_signal: bool) -> None:
    assert killed(code) is by_signal


@pytest.mark.parametrize(
    ("restarts", "wait"), [(1, 2), (2, 4), (5, 32), (6, LONGEST_BACKOFF_SECONDS), (10**6, LONGEST_BACKOFF_SECONDS)]
)
def test_the_wait_doubles_up_to_its_limit(restarts: int, wait: float) -> None:
    assert backoff_seconds(2.0, restarts) == wait
