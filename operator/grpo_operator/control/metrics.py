"""Prometheus metrics of the operator and of its jobs.

Invariant: counters and histograms never carry an object's name, and of words that a job's own code chooses a bounded number; gauges of a
job are made at each scrape from the jobs that exist, so they go with the job.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from grpo_operator import clock
from grpo_operator.facts import Job, Pod, Report

RECONCILE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REASONS_TOLD_APART = 200  # a process names its own reason when it ends
FIRST_STEP_BUCKETS = (10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)


@dataclass(frozen=True)
class JobView:
    """What is shown of one job."""

    job: Job
    pods: tuple[Pod, ...]
    report: Report | None


class OperatorMetrics:
    """The operator's own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._reasons: set[str] = set()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.reconciles = self._counter("grpo_operator_reconcile", "Reconciles by result (success, error).", "result")
        self.reconcile_seconds = Histogram(
            "grpo_operator_reconcile_duration_seconds",
            "Time of one reconcile, with its requests.",
            buckets=RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self.api_requests = self._counter(
            "grpo_operator_api_requests", "Requests to the API server by answer (code none: no answer).",
            "verb", "resource", "code",
        )  # fmt: skip
        self.watch_events = self._counter(
            "grpo_operator_watch_events", "Events that came through the watches.", "resource"
        )
        self.polls = self._counter("grpo_operator_status_polls", "Questions for a coordinator's status.", "result")
        self.restarts = self._counter(
            "grpo_job_restarts", "Failures of pods that were acted on.", "role", "reason", "action", "counted"
        )
        self.finished = self._counter("grpo_job_finished", "Jobs that ended.", "result")
        self.first_step_seconds = Histogram(
            "grpo_job_time_to_first_step_seconds",
            "From the first start of a job to its first finished step.",
            buckets=FIRST_STEP_BUCKETS,
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, *names: str) -> Counter:
        return Counter(name, text, names, registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is asked at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def count_request(self, verb: str, resource: str, code: str) -> None:
        self.api_requests.labels(verb, resource, code).inc()

    def count_change(self, before: Job, after: Job) -> None:
        """What the step from one status to the next says."""
        known = {(failure.pod_uid, failure.time) for failure in before.status.failures or ()}
        for failure in after.status.failures or ():
            if (failure.pod_uid, failure.time) not in known:
                counted = "true" if failure.counted else "false"
                reason = self._bounded(failure.reason or "")
                self.restarts.labels(failure.role or "", reason, failure.action or "", counted).inc()
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


class WatchCollector(Collector):
    """Freshness by watched resource."""

    def __init__(self, last_event_seconds: dict[str, float]) -> None:
        self._last = last_event_seconds

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "grpo_operator_watch_last_event_timestamp_seconds",
            "When a watch last delivered an event.",
            labels=["resource"],
        )
        for resource, when in self._last.items():
            family.add_metric([resource], when)
        yield family


class JobCollector(Collector):
    """Gauges of the jobs that `views` yields at a scrape."""

    def __init__(self, views: Callable[[], Iterable[JobView]]) -> None:
        self._views = views

    def collect(self) -> Iterator[Metric]:
        names = ["namespace", "job"]
        info = GaugeMetricFamily("grpo_job_info", "1 for each GRPOJob.", labels=[*names, "model", "state"])
        condition = GaugeMetricFamily(
            "grpo_job_condition", "1 for the status that a condition has.", labels=[*names, "type", "status"]
        )
        pods = GaugeMetricFamily("grpo_job_pods", "Pods of a job.", labels=[*names, "role", "phase"])
        numbers = {
            name: GaugeMetricFamily(name, text, labels=names)
            for name, text in {
                "grpo_job_step": "Finished steps.",
                "grpo_job_total_steps": "Steps of the whole run.",
                "grpo_job_epoch": "Passes over the training prompts.",
                "grpo_job_reward": "Mean reward of the last step.",
                "grpo_job_accuracy": "pass@1 of the last validation.",
                "grpo_job_policy_version": "Version of the trainer's weights.",
                "grpo_job_rollout_version": "Lowest version of weights in service.",
                "grpo_job_rollout_staleness_steps": "Mean age in steps of the samples trained on.",
                "grpo_job_tokens_per_second": "Throughput of the last step.",
                "grpo_job_last_progress_timestamp_seconds": "When the last step finished.",
                "grpo_job_checkpoint_step": "Step of the newest complete checkpoint.",
                "grpo_job_last_checkpoint_timestamp_seconds": "When the newest checkpoint was complete.",
                "grpo_job_attempt": "Generation of the coordinator and trainer pods.",
                "grpo_job_counted_restarts": "Counted restarts in the job's life.",
            }.items()
        }
        for view in self._views():
            job, status = view.job, view.job.status
            names_of = [job.namespace, job.name]
            info.add_metric([*names_of, _model(job), status.state or "Pending"], 1)
            for entry in status.conditions or ():
                condition.add_metric([*names_of, entry.type, entry.status], 1)
            for (role, phase), count in Tally((pod.role.value, pod.phase) for pod in view.pods).items():
                pods.add_metric([*names_of, role, phase], count)
            for name, value in _values(view).items():
                if value is not None:
                    numbers[name].add_metric(names_of, value)
        yield from (info, condition, pods, *numbers.values())


def _values(view: JobView) -> dict[str, float | None]:
    status = view.job.status
    progress, checkpoints = status.progress, status.checkpoints
    staleness = view.report.document.get("staleness") if view.report is not None else None
    mean = staleness.get("mean") if isinstance(staleness, dict) else None
    values: dict[str, float | None] = {
        "grpo_job_attempt": status.attempt,
        "grpo_job_counted_restarts": status.restarts,
        "grpo_job_rollout_staleness_steps": mean if isinstance(mean, float) else None,
    }
    if progress is not None:
        values |= {
            "grpo_job_step": progress.step,
            "grpo_job_total_steps": progress.total_steps,
            "grpo_job_epoch": progress.epoch,
            "grpo_job_reward": progress.reward,
            "grpo_job_accuracy": progress.accuracy,
            "grpo_job_policy_version": progress.policy_version,
            "grpo_job_rollout_version": progress.rollout_version,
            "grpo_job_tokens_per_second": progress.tokens_per_second,
            "grpo_job_last_progress_timestamp_seconds": _unix(progress.last_progress_time),
        }
    if checkpoints is not None:
        values |= {
            "grpo_job_checkpoint_step": checkpoints.last_step,
            "grpo_job_last_checkpoint_timestamp_seconds": _unix(checkpoints.time),
        }
    return values


def _is_true(job: Job, condition: str) -> bool:
    return any(entry.type == condition and entry.status == "True" for entry in job.status.conditions or ())


def _step(job: Job) -> int:
    return (job.status.progress.step if job.status.progress is not None else None) or 0


def _unix(time: str | None) -> float | None:
    moment = clock.parse(time)
    return None if moment is None else moment.timestamp()


def _model(job: Job) -> str:
    return job.spec.model.path if job.spec is not None else ""
