"""Prometheus metrics of the operator and of its jobs.

Invariant: counters and histograms never carry an object's name, and of words that a job's own code chooses a bounded number; gauges of a
job are made at each scrape from the jobs that exist, so they go with the job.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from grpo_operator import clock
from grpo_operator.build.resources import gpus
from grpo_operator.facts import Job, Pod, Report
from grpo_operator.labels import Role
from grpo_worker.catalogue import Declared, Number
from grpo_worker.config.status import Failure

REASONS_TOLD_APART = 200  # a process names its own reason when it ends


@dataclass(frozen=True)
class JobView:
    """What is shown of one job."""

    job: Job
    pods: tuple[Pod, ...]
    report: Report | None


class OperatorMetrics:
    """The operator's own, and those of its jobs."""

    def __init__(self, views: Callable[[], Iterable[JobView]]) -> None:
        """`views`: the jobs that exist, at each scrape."""
        self.registry = CollectorRegistry()
        self._reasons: set[str] = set()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        own, failures = Declared("operator", self.registry), Declared("failures", self.registry)
        Declared("jobs", self.registry).ask(lambda: (number for view in views() for number in job_numbers(view)))
        self.ask = own.ask
        self.reconciles = own.counter("grpo_operator_reconcile_total")
        self.reconcile_seconds = own.histogram("grpo_operator_reconcile_duration_seconds")
        self.api_requests = own.counter("grpo_operator_api_requests_total")
        self.watch_events = own.counter("grpo_operator_watch_events_total")
        self.polls = own.counter("grpo_operator_status_polls_total")
        self.restarts = failures.counter("grpo_job_restarts_total")
        self.lost_gpu_seconds = failures.counter("grpo_job_lost_gpu_seconds_total")
        self.finished = failures.counter("grpo_job_finished_total")
        self.first_step_seconds = failures.histogram("grpo_job_time_to_first_step_seconds")

    def count_request(self, verb: str, resource: str, code: str) -> None:
        self.api_requests.labels(verb, resource, code).inc()

    def count_change(self, before: Job, after: Job) -> None:
        """What the step from one status to the next says."""
        known = {(failure.pod_uid, failure.time) for failure in before.status.failures or ()}
        new = [each for each in after.status.failures or () if (each.pod_uid, each.time) not in known]
        lost = 0.0  # once, of whatever ended together
        for failure in sorted(new, key=lambda failure: failure.time or ""):
            counted = "true" if failure.counted else "false"
            reason = self._bounded(failure.reason or "")
            self.restarts.labels(failure.role or "", reason, failure.action or "", counted).inc()
            if not lost and (lost := lost_gpu_seconds(before, failure)):
                self.lost_gpu_seconds.labels(failure.role or "", reason).inc(lost)
        for result in ("Succeeded", "Failed"):
            if _is_true(after, result) and not _is_true(before, result):
                self.finished.labels(result).inc()
        if not _step(before) and _step(after) and after.status.start_time and after.status.progress:
            started, reached = _unix(after.status.start_time), _unix(after.status.progress.last_progress_time)
            if started is not None and reached is not None:
                self.first_step_seconds.observe(max(0.0, reached - started))

    def _bounded(self, reason: str) -> str:
        if reason not in self._reasons and len(self._reasons) >= REASONS_TOLD_APART:
            return "Other"
        self._reasons.add(reason)
        return reason


def job_numbers(view: JobView) -> Iterator[Number]:
    """Gauges of a job; what is not known is absent."""
    job, status = view.job, view.job.status
    of_job = (job.namespace, job.name)
    yield "grpo_job_info", (*of_job, _model(job), status.state or "Pending"), 1
    for entry in status.conditions or ():
        yield "grpo_job_condition", (*of_job, entry.type, entry.status), 1
    for (role, phase), count in Tally((pod.role.value, pod.phase) for pod in view.pods).items():
        yield "grpo_job_pods", (*of_job, role, phase), count
    for name, value in _values(view).items():
        if value is not None:
            yield f"grpo_job_{name}", of_job, value


def _values(view: JobView) -> dict[str, float | None]:
    spec, status = view.job.spec, view.job.status
    progress, checkpoints, budget = status.progress, status.checkpoints, status.budget
    staleness = view.report.document.get("staleness") if view.report is not None else None
    mean = staleness.get("mean") if isinstance(staleness, dict) else None
    values: dict[str, float | None] = {
        "attempt": status.attempt,
        "counted_restarts": status.restarts,
        "budget_restarts": budget.counted if budget is not None else None,
        "rollout_staleness_steps": mean if isinstance(mean, float) else None,
        "report_timestamp_seconds": view.report.read.timestamp() if view.report is not None else None,
    }
    if spec is not None:
        holding = [pod for pod in view.pods if pod.scheduled and not pod.over]
        values |= {
            "gpus": sum(gpus(spec, pod.role) for pod in holding),
            "max_restarts": spec.failure_policy.max_restarts,
            "stall_timeout_seconds": spec.failure_policy.stall_timeout_seconds,
        }
        if spec.rollout_pods:
            ready = sum(pod.role is Role.ROLLOUT and pod.ready and not pod.over for pod in view.pods)
            values |= {"rollouts_ready": ready, "rollouts_min": spec.rollout.min_replicas or spec.rollout_pods}
    if progress is not None:
        values |= {
            "step": progress.step,
            "total_steps": progress.total_steps,
            "epoch": progress.epoch,
            "eta_seconds": progress.eta_seconds,
            "reward": progress.reward,
            "accuracy": progress.accuracy,
            "policy_version": progress.policy_version,
            "rollout_version": progress.rollout_version,
            "tokens_per_second": progress.tokens_per_second,
            "last_progress_timestamp_seconds": _unix(progress.last_progress_time),
        }
    if checkpoints is not None:
        values |= {
            "checkpoint_step": checkpoints.last_step,
            "last_checkpoint_timestamp_seconds": _unix(checkpoints.time),
        }
    return values


def lost_gpu_seconds(job: Job, failure: Failure) -> float:
    """GPU seconds of work since the last checkpoint, or the start, that went with the set; 0 where one pod was replaced."""
    if job.spec is None or failure.action in (None, "RestartPod"):
        return 0.0
    checkpoints, end = job.status.checkpoints, _unix(failure.time)
    kept = [_unix(time) for time in (job.status.start_time, checkpoints.time if checkpoints else None)]
    since = max((time for time in kept if time is not None), default=None)
    held = job.spec.trainer.nodes * gpus(job.spec, Role.TRAINER) + job.spec.rollout_pods * gpus(job.spec, Role.ROLLOUT)
    return 0.0 if since is None or end is None else max(0.0, end - since) * held


def _is_true(job: Job, condition: str) -> bool:
    return any(entry.type == condition and entry.status == "True" for entry in job.status.conditions or ())


def _step(job: Job) -> int:
    return (job.status.progress.step if job.status.progress is not None else None) or 0


def _unix(time: str | None) -> float | None:
    moment = clock.parse(time)
    return None if moment is None else moment.timestamp()


def _model(job: Job) -> str:
    return job.spec.model.path if job.spec is not None else ""
