"""Start-up: all pods that training needs run within failurePolicy.startupTimeoutSeconds, or all give their devices back.

Invariant: no job holds devices for longer than that while it waits for others, so two half-scheduled jobs do not block each other for
ever. Engines beyond rollout.minReplicas may wait as long as they like, and so may all but one once the coordinator trains: a job that gets
on is never restarted for an engine that it can do without.
"""

from datetime import timedelta

from grpo_operator import clock
from grpo_operator.facts import Pod
from grpo_operator.planning import diagnose
from grpo_operator.planning.diagnose import Diagnosis
from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import restart
from grpo_operator.planning.policies.restart import Loss

NEVER = frozenset({"InvalidImageName"})  # what no waiting cures


def limit(draft: Draft) -> bool:
    waiting = [pod for pod in (*draft.set_pods, *draft.rollouts) if _waits(pod)]
    for pod in waiting:
        found = diagnose.not_started(pod, draft.spec)
        if found is not None and found.reason in NEVER:
            loss = Loss(pod.role, pod.index, found, pod)
            restart.record(draft, loss, "FailJob", counted=True)
            draft.fail(found.reason, found.message)
            return True
    for refusal in draft.refusals:
        if (
            refusal.invalid and refusal.member is not None and draft.status.progress is None
        ):  # else it has had such pods
            loss = Loss(*refusal.member, diagnose.refused(refusal))
            restart.record(draft, loss, "FailJob", counted=True)
            draft.fail(loss.diagnosis.reason, loss.diagnosis.message)
            return True
    needed = _needed(draft)
    if not needed:
        return False
    seconds = draft.spec.failure_policy.startup_timeout_seconds
    # engines may have waited since an earlier attempt
    begun = min((pod.created for pod in draft.set_pods), default=draft.now)
    due = max(begun, min(pod.created for pod in needed)) + timedelta(seconds=seconds)
    if draft.now < due:
        draft.wake_at(due)
        return False
    late = [pod for pod in needed if _waits(pod)] or needed
    pod = next((pod for pod in late if diagnose.not_started(pod, draft.spec) is not None), late[0])
    words = f"not all pods were running within {seconds:g} s (failurePolicy.startupTimeoutSeconds); all give their devices back."
    found = (
        diagnose.not_started(pod, draft.spec)
        or next((diagnose.refused(refusal) for refusal in draft.refusals), None)
        or Diagnosis("StartupTimeout", f"{pod.name} did not start.")
    )
    if draft.status.excluded_nodes:
        draft.update(excluded_nodes=[])  # nobody else could take the pods
    restart.restart_job(
        draft,
        Loss(pod.role, pod.index, Diagnosis(found.reason, f"{found.message} Start-up: {words}"), pod),
        counted=True,
    )
    return draft.terminal


def _needed(draft: Draft) -> list[Pod]:
    """Pods that the job waits for; those of a set that is not complete wait for the rest of it."""
    members = draft.set_pods
    if draft.missing and draft.status.complete_attempt != draft.attempt:
        return members
    wanted = draft.spec.rollout.min_replicas or draft.spec.rollout_pods
    running = sum(pod.started and pod.ended is None for pod in draft.rollouts)
    enough = running >= min(1 if _has_trained(draft) else wanted, draft.spec.rollout_pods)
    return [pod for pod in (*members, *([] if enough else draft.rollouts)) if _waits(pod)]


def _has_trained(draft: Draft) -> bool:
    """The present coordinator has got past its start, as it says or, after the operator's own restart, as the status says."""
    told = clock.parse(draft.status.progress.report_time) if draft.status.progress is not None else None
    return draft.trains or (told is not None and draft.coordinator is not None and told > draft.coordinator.created)


def _waits(pod: Pod) -> bool:
    return not pod.started and pod.ended is None and not pod.deleting
