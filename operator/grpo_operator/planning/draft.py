"""A plan in the making: what was observed, the status as it shall be, and the actions so far.

Invariant: everything here is a function of the observation, `now` and what policies have put in; a property always tells of the status
as it shall be, so a pod of the attempt that a policy has just ended is left over at once.
"""

from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from grpo_operator import clock
from grpo_operator.facts import Job, Observation, Pod, Refusal
from grpo_operator.labels import Role, pod_name
from grpo_operator.planning import conditions
from grpo_operator.planning.actions import CreatePod, DeletePod, Event
from grpo_worker.config import Spec
from grpo_worker.config.status import Budget, ConditionType, Failure, GRPOJobStatus

FAILURES_KEPT = 10
END_GRACE_SECONDS = 10  # of pods that have nothing left to save


class Draft:
    """Used by one call of `plan`."""

    def __init__(self, seen: Observation, now: datetime) -> None:
        self.seen, self.now = seen, now
        self.status = with_defaults(seen.job.status)
        self.events: list[Event] = []
        self.creates: list[CreatePod] = []
        self.stop_coordinator = ""
        self.delete_job = False
        self._deletes: dict[str, DeletePod] = {}
        self._wake: datetime | None = None

    @property
    def job(self) -> Job:
        return self.seen.job

    @cached_property
    def spec(self) -> Spec:
        """Only after `policies.validity` has let the job through."""
        if self.job.spec is None:
            raise ValueError(f"{self.job.name}: the document is not valid: {self.job.invalid}")
        return self.job.spec

    @property
    def attempt(self) -> int:
        return self.status.attempt or 0

    @property
    def budget(self) -> Budget:
        return self.status.budget or Budget()

    @property
    def terminal(self) -> bool:
        return conditions.holds(self.status, "Succeeded") or conditions.holds(self.status, "Failed")

    @property
    def stopping(self) -> bool:
        """The job is on its way to no pods: nothing is restarted."""
        return self.spec.suspend or self.status.stop_requested_time is not None

    # pods

    @property
    def members(self) -> list[tuple[Role, int]]:
        """Coordinator and trainers: they hold one state and live and die together."""
        return [(Role.COORDINATOR, 0), *((Role.TRAINER, index) for index in range(self.spec.trainer.nodes))]

    @property
    def wanted(self) -> list[tuple[Role, int]]:
        """All that the job is to have: the set, and rollout.replicas engines with pods of their own."""
        return [*self.members, *((Role.ROLLOUT, index) for index in range(self.spec.rollout_pods))]

    @property
    def set_pods(self) -> list[Pod]:
        """Coordinator and trainer pods of the present attempt."""
        return [pod for pod in self.seen.pods if pod.role is not Role.ROLLOUT and pod.attempt == self.attempt]

    @property
    def coordinator(self) -> Pod | None:
        return next((pod for pod in self.set_pods if pod.role is Role.COORDINATOR), None)

    @property
    def missing(self) -> list[tuple[Role, int]]:
        """Members of the set without a pod of the present attempt."""
        there = {(pod.role, pod.index) for pod in self.set_pods}
        return [member for member in self.members if member not in there]

    @property
    def rollouts(self) -> list[Pod]:
        """Rollout pods that the job wants, by index."""
        wanted = range(self.spec.rollout_pods)
        oldest = self.status.rollout_attempt or 0
        pods = (pod for pod in self.seen.pods if pod.role is Role.ROLLOUT and pod.attempt >= oldest)
        return sorted((pod for pod in pods if pod.index in wanted), key=lambda pod: pod.index)

    @property
    def excess(self) -> list[Pod]:
        """Rollout pods beyond rollout.replicas."""
        return [pod for pod in self.seen.pods if pod.role is Role.ROLLOUT and pod.index >= self.spec.rollout_pods]

    @property
    def leftovers(self) -> list[Pod]:
        """Pods of earlier attempts."""
        oldest = {Role.ROLLOUT: self.status.rollout_attempt or 0}
        return [pod for pod in self.seen.pods if pod.attempt < oldest.get(pod.role, self.attempt)]

    def pod_name(self, role: Role, index: int) -> str:
        return pod_name(self.job.name, role, index)

    @property
    def refusals(self) -> list[Refusal]:
        """Of what pods wait for that the job wants and still lacks."""
        there = {(pod.role, pod.index) for pod in self.seen.pods}
        lacking = set(self.wanted) - there
        return [item for item in self.seen.refusals if lacking and (item.member is None or item.member in lacking)]

    # the coordinator's word

    @property
    def report(self) -> dict[str, Any] | None:
        """What the coordinator of the present attempt said last."""
        report, coordinator = self.seen.report, self.coordinator
        if report is None or coordinator is None or report.pod_uid != coordinator.uid:
            return None
        return report.document

    @property
    def trains(self) -> bool:
        """The present coordinator has got past its start."""
        return self.report is not None and self.report.get("state") not in (None, "Starting", "Failed")

    # the status

    def update(self, **changes: Any) -> None:
        self.status = self.status.model_copy(update=changes)

    def condition(self, kind: ConditionType, value: conditions.Value, reason: str, message: str = "") -> None:
        self.update(
            conditions=conditions.with_condition(
                self.status.conditions, kind, value, reason, message, self.job.generation, self.now
            )
        )

    def handled(self, pod: Pod) -> bool:
        """Whether the end of this very pod is in the status, so that it is charged once."""
        return any(failure.pod_uid == pod.uid for failure in self.status.failures or [])

    @property
    def room_for_failures(self) -> int:
        """New failures that fit without forgetting one whose pod is still there."""
        present = {pod.uid for pod in self.seen.pods}
        return FAILURES_KEPT - sum(failure.pod_uid in present for failure in self.status.failures or [])

    def record(self, failure: Failure) -> None:
        """Keeps the newest ten, and before others those whose pods still exist."""
        present = {pod.uid for pod in self.seen.pods}
        failures = [failure, *(self.status.failures or [])]
        while len(failures) > FAILURES_KEPT:
            gone = [item for item in failures[1:] if item.pod_uid not in present]
            failures.remove(gone[-1] if gone else failures[-1])
        self.update(failures=failures)

    def succeed(self, message: str) -> None:
        self.update(completion_time=clock.text(self.now), stop_requested_time=None)
        self.condition("Succeeded", "True", "Completed", message)
        self.condition("Failed", "False", "Completed")
        self.normal("Succeeded", message)

    def fail(self, reason: str, message: str) -> None:
        self.update(completion_time=clock.text(self.now), stop_requested_time=None)
        self.condition("Failed", "True", reason, message)
        self.condition("Succeeded", "False", reason)
        self.warning(reason, message)

    # actions

    def normal(self, reason: str, message: str) -> None:
        self.events.append(Event("Normal", reason, message))

    def warning(self, reason: str, message: str) -> None:
        self.events.append(Event("Warning", reason, message))

    def delete(self, pod: Pod, grace_seconds: int | None = END_GRACE_SECONDS) -> None:
        """Once: a pod that is being deleted is left to it, unless this is to force it."""
        if not pod.deleting or grace_seconds == 0:
            self._deletes[pod.uid] = DeletePod(pod.name, pod.uid, grace_seconds)

    def create(self, role: Role, index: int) -> None:
        """Not while an object of that name is there."""
        if not any((pod.role, pod.index) == (role, index) for pod in self.seen.pods):
            self.creates.append(CreatePod(role, index))

    @property
    def deletes(self) -> tuple[DeletePod, ...]:
        return tuple(self._deletes.values())

    def wake_at(self, time: datetime) -> None:
        """Plan again then at the latest."""
        self._wake = time if self._wake is None else min(self._wake, time)

    def wake_in(self, seconds: float) -> None:
        self.wake_at(self.now + timedelta(seconds=seconds))

    @property
    def requeue_after_seconds(self) -> float | None:
        return None if self._wake is None else max((self._wake - self.now).total_seconds(), 0.0)


def with_defaults(status: GRPOJobStatus) -> GRPOJobStatus:
    """A status whose counters are numbers."""
    zeros: dict[str, Any] = {
        name: 0
        for name in ("attempt", "rollout_attempt", "restarts", "uncounted_restarts")
        if getattr(status, name) is None
    }
    budget = status.budget or Budget()
    counters = {
        name: 0
        for name in ("counted", "uncounted", "rollout_counted", "rollout_uncounted")
        if getattr(budget, name) is None
    }
    return status.model_copy(
        update={**zeros, "budget": budget.model_copy(update=counters), "failures": status.failures or []}
    )
