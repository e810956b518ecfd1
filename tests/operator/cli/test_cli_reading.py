"""How a job ended, and with which exit code."""

from typing import Any

import pytest
from cli_jobs import NOW, TRAINING, job, new_job, suspended, with_condition

from grpo_operator.cli.reading import JobEnded, JobFailed, ended, failure_code, seconds
from grpo_worker.errors import ExitCode, YieldedError


@pytest.mark.parametrize(
    ("document", "state"),
    [
        (TRAINING, None),
        (new_job(), None),
        ({}, None),
        ({"status": {"conditions": "nonsense"}}, None),
        (with_condition(TRAINING, "Succeeded", "True"), "Succeeded"),
        (with_condition(TRAINING, "Failed", "True"), "Failed"),
        (suspended(), "Suspended"),
    ],
)
def test_conditions_say_whether_a_job_has_ended(document: dict[str, Any], state: str | None) -> None:
    found = ended(document)
    assert (found.state if found else None) == state


def test_a_resumed_job_has_not_ended_while_its_condition_is_still_the_old_one() -> None:
    document = suspended()
    document["spec"]["suspend"] = False
    assert ended(document) is None


def test_the_state_alone_ends_nothing() -> None:
    assert ended(job(state="Succeeded")) is None


@pytest.mark.parametrize(
    ("reason", "exit_code", "expected"),
    [
        ("InvalidConfiguration", None, ExitCode.CONFIG),
        ("InvalidJob", None, ExitCode.USAGE),
        ("InvalidData", 65, ExitCode.DATA),
        ("OutOfMemory", 1, ExitCode.MEMORY),
        ("NCCLTimeout", 85, ExitCode.DEVICE),
        ("NCCLTimeout", 137, ExitCode.INTERNAL),
        ("NCCLTimeout", 1, ExitCode.INTERNAL),
        ("NCCLTimeout", 80, ExitCode.INTERNAL),
        ("NCCLTimeout", 0, ExitCode.INTERNAL),
        ("Unschedulable", None, ExitCode.INTERNAL),
        ("Stalled", 82, ExitCode.STALLED),
        ("InvalidSpec", None, ExitCode.USAGE),
        ("DeadlineExceeded", 85, ExitCode.CONFIG),
    ],
)
def test_the_exit_code_of_a_failed_job_is_always_of_the_contract(
    reason: str, exit_code: int | None, expected: ExitCode
) -> None:
    document = with_condition(job(failures=[{"exitCode": exit_code, "reason": "X"}]), "Failed", "True", reason)
    assert failure_code(document) is expected


def test_a_failed_job_without_failures_ends_with_70() -> None:
    assert (
        failure_code(with_condition(new_job() | {"status": {"conditions": []}}, "Failed", "True")) is ExitCode.INTERNAL
    )


def test_the_end_of_a_job_is_raised_as_its_exit_code() -> None:
    with pytest.raises(JobFailed, match="a failed: DeviceFailed: ECC") as failed:
        JobEnded("Failed", ExitCode.DEVICE, "DeviceFailed: ECC").raise_failure("a", "grpo resume a")
    assert failed.value.exit_code == 85
    with pytest.raises(YieldedError, match="grpo resume a"):
        JobEnded("Suspended", ExitCode.YIELDED, "").raise_failure("a", "grpo resume a")
    JobEnded("Succeeded", ExitCode.DONE, "").raise_failure("a", "grpo resume a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-09-21T14:13:20Z", NOW),
        ("2026-09-21T14:13:20.000000Z", NOW),
        ("2026-09-21T16:13:20+02:00", NOW),
        ("yesterday", None),
        (None, None),
        (5, None),
    ],
)
def test_times_are_rfc_3339(text: Any, expected: float | None) -> None:
    assert seconds(text) == expected
