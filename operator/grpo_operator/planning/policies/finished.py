"""A job that has succeeded or failed.

Invariant: terminal is sticky: no pod is made any more. Running pods end; ended ones stay for their logs until the job is deleted, by a
person or by ttlSecondsAfterFinished.
"""

from datetime import timedelta

from grpo_operator import clock
from grpo_operator.planning import conditions
from grpo_operator.planning.draft import Draft

FAREWELL_SECONDS = 30.0  # in which workers that were told to stop end by themselves


def keep(draft: Draft) -> bool:
    if not draft.terminal:
        return False
    finished = clock.parse(draft.status.completion_time) or draft.now
    farewell = finished + timedelta(seconds=FAREWELL_SECONDS if _ends_by_itself(draft) else 0)
    running = [pod for pod in draft.seen.pods if not pod.over and not pod.deleting]
    if running and draft.now < farewell:
        draft.wake_at(farewell)
        running = [pod for pod in running if not pod.started]
    for pod in running:
        draft.delete(pod)
    _expire(draft)
    return True


def _ends_by_itself(draft: Draft) -> bool:
    failed = conditions.find(draft.status, "Failed")
    return conditions.holds(draft.status, "Succeeded") or (failed is not None and failed.reason == "DeadlineExceeded")


def _expire(draft: Draft) -> None:
    """ttlSecondsAfterFinished; counted from the end, so that shortening it later works too."""
    limit = draft.job.spec.ttl_seconds_after_finished if draft.job.spec is not None else None
    finished = clock.parse(draft.status.completion_time)
    if limit is None or finished is None:
        return
    due = finished + timedelta(seconds=limit)
    if draft.now >= due:
        draft.delete_job = True
    else:
        draft.wake_at(due)
