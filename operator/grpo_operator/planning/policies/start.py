"""Makes the pods that are missing, after what is left over is gone.

Invariant: never two pods of one role and index, and never coordinator or trainer pods of two attempts: the set of an attempt is made only
when no pod of an earlier set exists.
"""

from grpo_operator import clock
from grpo_operator.labels import Role
from grpo_operator.planning.draft import Draft

LEFTOVER_GRACE_SECONDS = (
    1  # a coordinator with time to say farewell would tell the engines, which are to stay, that the run is over
)


def start(draft: Draft) -> bool:
    for pod in draft.leftovers:
        draft.delete(pod, LEFTOVER_GRACE_SECONDS)
    budget = draft.budget
    left = any(pod.role is not Role.ROLLOUT for pod in draft.leftovers)
    if not left and _due(draft, budget.not_before):
        for role, index in draft.missing:
            draft.create(role, index)
    if _due(draft, budget.rollout_not_before):
        for index in range(draft.spec.rollout_pods):
            draft.create(Role.ROLLOUT, index)
    if not draft.missing and draft.status.complete_attempt != draft.attempt:
        draft.update(complete_attempt=draft.attempt)
    return False


def _due(draft: Draft, not_before: str | None) -> bool:
    time = clock.parse(not_before)
    if time is not None and draft.now < time:
        draft.wake_at(time)
        return False
    return True
