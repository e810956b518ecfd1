"""What the operator's metrics make of words and numbers that a job's own code chose."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from grpo_operator.control.metrics import REASONS_TOLD_APART, JobCollector, JobView, OperatorMetrics
from grpo_operator.facts import Job, Report
from grpo_worker.config.status import Failure, GRPOJobStatus

NOW = datetime(2026, 11, 22, tzinfo=UTC)
JOB = Job("demo", "team", "j1", 1, NOW, None, GRPOJobStatus(), {})


def test_reasons_are_told_apart_up_to_a_limit() -> None:
    metrics = OperatorMetrics()
    for number in range(REASONS_TOLD_APART + 50):
        failure = Failure(
            pod_uid=f"p{number}", role="trainer", reason=f"Reason{number}", action="RestartSet", counted=True
        )
        metrics.count_change(JOB, replace(JOB, status=GRPOJobStatus(failures=[failure])))
    text = generate_latest(metrics.registry).decode()
    assert text.count("grpo_job_restarts_total{") == REASONS_TOLD_APART + 1
    assert 'reason="Other",role="trainer"} 50.0' in text


@pytest.mark.parametrize("staleness", [["odd"], "odd", {"mean": "odd"}, {"mean": 10**400}, {"mean": None}, None])
def test_a_report_that_is_odd_does_not_spoil_the_scrape(staleness: Any) -> None:
    registry = CollectorRegistry()
    report = Report("p1", NOW, {"staleness": staleness})
    registry.register(JobCollector(lambda: [JobView(JOB, (), report)]))
    assert 'grpo_job_info{job="demo"' in generate_latest(registry).decode()
