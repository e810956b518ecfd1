"""A status may be partial, and what is written is what is read."""

from typing import Any

import pytest
from pydantic import ValidationError

from grpo_worker.config.status import Condition, Failure, GRPOJobStatus, Progress


def test_an_empty_status_writes_nothing() -> None:
    assert GRPOJobStatus().document() == {}
    assert GRPOJobStatus.model_validate({}) == GRPOJobStatus()


def test_names_are_those_of_kubernetes() -> None:
    status = GRPOJobStatus(
        observed_generation=2, progress=Progress(eta_seconds=1), failures=[Failure(pod_uid="0", exit_code=85)]
    )
    assert status.document() == {
        "observedGeneration": 2,
        "progress": {"etaSeconds": 1.0},
        "failures": [{"podUID": "0", "exitCode": 85}],
    }
    assert GRPOJobStatus.model_validate(status.document()) == status


def test_what_a_newer_operator_wrote_is_read_past() -> None:
    assert GRPOJobStatus.model_validate({"attempt": 1, "invented": {"later": 1}}) == GRPOJobStatus(attempt=1)


@pytest.mark.parametrize(
    "status",
    [
        {"state": "Running"},
        {"attempt": "1"},
        {"progress": {"reward": float("nan")}},
        {"conditions": [{"type": "Ready"}]},
        {"conditions": [{"type": "Done", "status": "True"}]},
    ],
)
def test_a_status_outside_of_its_contract_is_refused(status: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GRPOJobStatus.model_validate(status)


def test_a_status_is_immutable() -> None:
    with pytest.raises(ValidationError):
        Condition(type="Ready", status="True").status = "False"  # type: ignore[misc]
