"""spec.suspend: save, stop, free the devices, keep the state; and go on again.

Invariant: a suspended job has no pods; a resumed one has a new attempt. A stop that has begun is completed, even when somebody takes
suspend back: the coordinator is ending already.
"""

from grpo_operator import clock
from grpo_operator.planning import conditions
from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import budget, stop


def suspend(draft: Draft) -> bool:
    """True while the job is to have no pods."""
    if not draft.stopping:
        return False
    if not draft.seen.pods:
        _suspended(draft)
        return True
    if stop.stopped(draft, "spec.suspend"):
        for pod in draft.seen.pods:
            draft.delete(pod)
    return True


def _suspended(draft: Draft) -> None:
    if not conditions.holds(draft.status, "Suspended"):
        step = draft.status.checkpoints.last_step if draft.status.checkpoints is not None else None
        saved = f"Saved at step {step}." if step is not None else "Nothing was saved yet."
        if draft.status.start_time is None:
            saved = "Not started."
        draft.condition("Suspended", "True", "Suspended", f"{saved} Set spec.suspend: false to go on.")
        draft.condition("Restarting", "False", "Suspended")
        draft.normal("Suspended", f"All pods are gone. {saved}")
    draft.update(stop_requested_time=None)
    if not draft.spec.suspend:
        draft.wake_in(0)  # taken back meanwhile


def resume(draft: Draft) -> bool:
    """Before anybody looks for pods: those of the attempt before are missing for a good reason."""
    if draft.stopping or not conditions.holds(draft.status, "Suspended"):
        return False
    since = conditions.since(draft.status, "Suspended")
    draft.condition("Suspended", "False", "Resumed")
    if draft.status.start_time is None:
        return False
    idle = (draft.now - since).total_seconds() if since is not None else 0.0
    attempt = draft.attempt + 1
    draft.update(
        attempt=attempt,
        rollout_attempt=attempt,
        suspended_seconds=(draft.status.suspended_seconds or 0.0) + max(idle, 0.0),
        budget=budget.renewed(draft.budget),
    )
    step = draft.status.checkpoints.last_step if draft.status.checkpoints is not None else None
    draft.normal(
        "Resumed",
        f"Going on from the checkpoint of step {step}." if step is not None else "Starting: nothing was saved.",
    )
    return False


def begin(draft: Draft) -> bool:
    """The job's time begins with the first visit that may make pods."""
    if draft.status.start_time is None:
        draft.update(start_time=clock.text(draft.now))
        draft.normal("Started", "Creating coordinator, trainers and rollout engines.")
    return False
