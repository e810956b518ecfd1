"""rollout.replicas of a running job.

Invariant: the highest indices go first, each with its grace period, and training goes on.
"""

from grpo_operator.labels import Role
from grpo_operator.planning.draft import Draft


def scale(draft: Draft) -> bool:
    for pod in draft.excess:
        draft.delete(pod, grace_seconds=None)
    before = next((role.desired for role in draft.seen.job.status.roles or [] if role.name == Role.ROLLOUT.value), None)
    if before is not None and before != draft.spec.rollout_pods:
        draft.normal("Scaled", f"rollout.replicas: {before} -> {draft.spec.rollout_pods}.")
    return False
