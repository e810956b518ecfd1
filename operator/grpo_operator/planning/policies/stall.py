"""A job that lives but does not get on: judged by finished steps, never by heartbeats.

Invariant: between two finished steps, or the start of an attempt and its first, lie at most stallTimeoutSeconds (and, before the
coordinator has got past its start, startupTimeoutSeconds more), or coordinator and trainers restart. A coordinator that cannot be reached
gets no longer than one that can.
"""

from datetime import timedelta

from grpo_operator import clock
from grpo_operator.planning.diagnose import Diagnosis
from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import restart
from grpo_operator.planning.policies.restart import Loss


def watch(draft: Draft) -> bool:
    coordinator = draft.coordinator
    if coordinator is None or not coordinator.started or coordinator.ended is not None or coordinator.deleting:
        return False
    policy, report = draft.spec.failure_policy, draft.report or {}
    stored = clock.parse(draft.status.progress.last_progress_time) if draft.status.progress is not None else None
    known = [coordinator.created, stored, clock.from_unix(report.get("last_progress_time"))]
    seconds = policy.stall_timeout_seconds + (0.0 if draft.trains else policy.startup_timeout_seconds)
    last = max(min(time, draft.now) for time in known if time is not None)  # a worker's clock may run ahead
    due = last + timedelta(seconds=seconds)
    if draft.now < due:
        draft.wake_at(due)
        return False
    unreachable = "" if report else " The coordinator could not be reached."
    message = (
        f"No step was finished within {seconds:g} s (failurePolicy.stallTimeoutSeconds).{unreachable} "
        "See the logs of coordinator and trainers for what they wait for."
    )
    restart.restart_set(draft, Loss(coordinator.role, 0, Diagnosis("Stalled", message), coordinator), counted=True)
    return draft.terminal
