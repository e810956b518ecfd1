"""Pods whose node no longer answers: they would be Terminating for ever, and their names taken.

Invariant: a pod is forced away only after its whole grace period and a margin, when a living kubelet would long have ended it; its loss is
not charged to the job, unless a rule of the job says so.
"""

from datetime import timedelta

from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import failure

MARGIN_SECONDS = 30.0


def release(draft: Draft) -> bool:
    for pod in draft.seen.pods:
        if pod.deletion_deadline is None:
            continue
        due = pod.deletion_deadline + timedelta(seconds=MARGIN_SECONDS)
        if draft.now < due:
            draft.wake_at(due)
            continue
        draft.delete(pod, grace_seconds=0)
        if draft.terminal or draft.job.spec is None or draft.stopping or draft.handled(pod) or pod.ended is not None:
            continue
        wanted = pod in draft.set_pods or (pod in draft.rollouts and draft.room_for_failures > 0)
        if wanted:
            failure.act(draft, pod, failure.decide(pod, draft))
    return False
