"""Save and stop: the way to no pods that suspend and the deadline share.

Invariant: the coordinator is asked, and has terminationGracePeriodSeconds from the first time it was asked; what has not saved by then
goes on from the checkpoint before. Asking again does no harm, so it is repeated as long as the coordinator runs. One that cannot be reached
is asked by deleting its pod: it saves on SIGTERM too, and needs the trainers for that, so they stay.
"""

from datetime import datetime, timedelta

from grpo_operator import clock
from grpo_operator.facts import Pod
from grpo_operator.planning.draft import Draft

ASK_AGAIN_SECONDS = 5.0
FAREWELL_SECONDS = 30.0  # after the coordinator's end, for those whom it told
UNHEARD_SECONDS = 20.0  # without a word since it was asked: the request does not reach it


def stopped(draft: Draft, why: str) -> bool:
    """Ask and wait. True once nothing is left to wait for: every pod may go."""
    if draft.status.stop_requested_time is None:
        draft.update(stop_requested_time=clock.text(draft.now))
        draft.normal("Stopping", f"{why}: saving, then stopping.")
    asked = clock.parse(draft.status.stop_requested_time) or draft.now
    limit = asked + timedelta(seconds=draft.spec.runtime.termination_grace_period_seconds)
    coordinator = draft.coordinator
    if coordinator is None or not coordinator.started:
        return True  # nothing to save
    if coordinator.ended is None:
        if draft.now >= limit:
            return True
        if _unheard(draft, coordinator, asked, limit):
            draft.delete(coordinator, grace_seconds=max(1, int((limit - draft.now).total_seconds())))
        elif not coordinator.deleting:
            draft.stop_coordinator = coordinator.name
        draft.wake_in(ASK_AGAIN_SECONDS)
        draft.wake_at(limit)
        return False
    return _everybody_ended(draft, min(limit, _end(coordinator.ended.finished, draft.now)))


def _unheard(draft: Draft, coordinator: Pod, asked: datetime, limit: datetime) -> bool:
    """Without any report of it the operator may have started just now, and gets longer to hear one."""
    report = draft.seen.report
    if report is None or report.pod_uid != coordinator.uid:
        return draft.now >= asked + (limit - asked) / 2
    return draft.now >= max(report.read, asked) + timedelta(seconds=UNHEARD_SECONDS)


def _everybody_ended(draft: Draft, limit: datetime) -> bool:
    running = [pod for pod in draft.seen.pods if pod.ended is None and pod.started]
    if running and draft.now < limit:
        draft.wake_at(limit)
        return False
    return True


def _end(finished: datetime | None, now: datetime) -> datetime:
    return (finished or now - timedelta(seconds=FAREWELL_SECONDS)) + timedelta(seconds=FAREWELL_SECONDS)
