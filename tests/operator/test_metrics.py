"""What the operator's metrics make of words and numbers that a job's own code chose."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from grpo_operator import clock
from grpo_operator.control.metrics import REASONS_TOLD_APART, JobView, OperatorMetrics
from grpo_operator.facts import Job, Pod, Report
from grpo_operator.labels import Role
from grpo_worker.catalogue import entries
from grpo_worker.config import Spec, load_job
from grpo_worker.config.status import Budget, Checkpoints, Condition, ConditionType, Failure, GRPOJobStatus, Progress

EXAMPLES = Path(__file__).parents[2] / "examples"
NOW = datetime(2026, 11, 22, tzinfo=UTC)
JOB = Job("demo", "team", "j1", 1, NOW, None, GRPOJobStatus(), {})


def test_reasons_are_told_apart_up_to_a_limit() -> None:
    metrics = OperatorMetrics(lambda: ())
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
    report = Report("p1", NOW, {"staleness": staleness})
    metrics = OperatorMetrics(lambda: [JobView(JOB, (), report)])
    assert 'grpo_job_info{grpojob="demo"' in generate_latest(metrics.registry).decode()


def pods(spec: Spec) -> tuple[Pod, ...]:
    """All that the job should have, and a trainer that is over."""
    wanted = [(Role.COORDINATOR, 1), (Role.TRAINER, spec.trainer.nodes), (Role.ROLLOUT, spec.rollout_pods)]
    alive = [
        Pod(f"{role}-{n}", f"{role}-{n}", role, n, 1, NOW, "Running", scheduled=True, ready=True)
        for role, count in wanted
        for n in range(count)
    ]
    return (*alive, replace(alive[1], phase="Failed"))


def full(name: str, progress: Progress | None = None) -> Job:
    """verl's job: two trainers of 8 GPUs, 8 engines of 2, six of which are enough."""
    spec = load_job(EXAMPLES / "qwen3-8b-gsm8k.yaml").spec
    conditions = [Condition(type=kind, status="True") for kind in get_args(ConditionType)]
    status = GRPOJobStatus(
        state="Training", attempt=2, restarts=1, conditions=conditions, budget=Budget(counted=1), start_time=text(0),
        progress=progress or Progress(step=7, total_steps=9, epoch=0.5, eta_seconds=60.0, reward=0.5, accuracy=0.5,
                                      policy_version=7, rollout_version=6, tokens_per_second=9.0, last_progress_time=text(500)),
        checkpoints=Checkpoints(last_step=5, time=text(300)),
    )  # fmt: skip
    return Job(name, "team", name, 1, NOW, spec, status, {})


def text(seconds: float) -> str:
    return clock.text(NOW + timedelta(seconds=seconds))


def scrape(metrics: OperatorMetrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def test_what_a_job_holds_and_needs() -> None:
    job = full("j1")
    assert job.spec is not None
    found = scrape(OperatorMetrics(lambda: [JobView(job, pods(job.spec), Report("p", NOW, {}))]))  # type: ignore[arg-type]
    labels = {"namespace": "team", "grpojob": "j1"}
    expected = {"gpus": 2 * 8 + 8 * 2, "rollouts_ready": 8, "rollouts_min": 6, "step": 7, "eta_seconds": 60, "max_restarts": 5, "stall_timeout_seconds": 3600,
                "budget_restarts": 1, "report_timestamp_seconds": NOW.timestamp(), "checkpoint_step": 5,
                "last_checkpoint_timestamp_seconds": NOW.timestamp() + 300}  # fmt: skip
    assert {name: found[f"grpo_job_{name}"] for name in expected} == {
        name: [(labels, value)] for name, value in expected.items()
    }


def test_every_metric_of_a_job_is_in_the_catalogue_and_the_catalogue_has_no_other() -> None:
    job = full("j1")
    found = scrape(
        OperatorMetrics(lambda: [JobView(job, pods(job.spec), Report("p", NOW, {"staleness": {"mean": 0.5}}))])
    )  # type: ignore[arg-type]
    listed = entries("jobs")
    assert {name for name in found if name in listed} == set(listed)
    assert all(set(labels) == set(listed[name].labels) for name in listed for labels, _ in found[name])


def test_two_hundred_jobs_are_a_bounded_number_of_series_and_go_with_their_jobs() -> None:
    views = [JobView(job, pods(job.spec), Report("p", NOW, {})) for job in (full(f"j{n}") for n in range(200))]  # type: ignore[arg-type]
    metrics = OperatorMetrics(lambda: views)

    def series() -> int:
        return sum(map(len, scrape(metrics).values()))

    with_all = series()
    del views[1:]
    with_one = series()
    a_job = (with_all - with_one) / 199
    assert a_job <= 40, "series of one job"
    del views[:]
    assert series() == with_one - a_job


@pytest.mark.parametrize(
    ("action", "failed_at", "lost"),
    [
        ("RestartSet", 360, 60 * 32),  # since the checkpoint at 300, on 32 GPUs
        ("FailJob", 360, 60 * 32),
        ("RestartPod", 360, 0),  # an engine's prompts go to others
        ("RestartSet", 299, 0),  # told late: nothing is lost twice
    ],
)
def test_what_a_failure_costs(action: str, failed_at: float, lost: float) -> None:
    job, metrics = full("j1"), OperatorMetrics(lambda: ())
    failures = [
        Failure(pod_uid=uid, time=text(failed_at), role="trainer", reason="OOMKilled", action=action, counted=True)
        for uid in ("a", "b")  # two pods that ended together cost their work once
    ]
    after = replace(job, status=job.status.model_copy(update={"failures": failures}))
    metrics.count_change(job, after)
    metrics.count_change(after, after)
    counted = scrape(metrics).get("grpo_job_lost_gpu_seconds_total", [])
    assert [value for _, value in counted] == ([lost] if lost else [])
