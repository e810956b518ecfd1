"""activeDeadlineSeconds: the job saves, stops, and has failed.

Invariant: time counts from startTime, across restarts, without what was spent suspended.
"""

from datetime import timedelta

from grpo_operator import clock
from grpo_operator.planning import conditions
from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import stop


def enforce(draft: Draft) -> bool:
    limit, start = draft.spec.active_deadline_seconds, clock.parse(draft.status.start_time)
    if limit is None or start is None or conditions.holds(draft.status, "Suspended"):
        return False
    due = start + timedelta(seconds=limit + (draft.status.suspended_seconds or 0.0))
    if draft.now < due:
        draft.wake_at(due)
        return False
    if stop.stopped(draft, f"activeDeadlineSeconds ({limit}) are over"):
        step = draft.status.checkpoints.last_step if draft.status.checkpoints is not None else None
        saved = f"its state is saved at step {step}" if step is not None else "nothing was saved yet"
        draft.fail(
            "DeadlineExceeded",
            f"The job ran longer than activeDeadlineSeconds ({limit}); {saved}. A new job with checkpoint.resume goes on from it.",
        )
    return True
