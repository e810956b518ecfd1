"""What follows when pods end: success, the end of the job, a restart of the set, or another engine.

Invariant: the same table as `grpo run` (`grpo_worker.exit_policy`), after the job's own rules; each pod's end is acted on once. Nothing
is restarted while the job stops.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from grpo_operator.facts import Pod
from grpo_operator.labels import Role
from grpo_operator.planning import diagnose
from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import restart
from grpo_operator.planning.policies.restart import Loss
from grpo_worker.exit_policy import Verdict, explanation_rank, verdict

SECOND_WORD_SECONDS = 5.0  # coordinator and trainers end within so long of each other
TOLD_TO_STOP_SECONDS = 30.0  # after a worker ended as told, for the coordinator to end too
DISRUPTIONS = frozenset(
    {"Evicted", "NodeLost", "Preempting", "NodeShutdown", "Terminated", "Shutdown", "ContainerStatusUnknown"}
)
REFUSALS = ("UnexpectedAdmissionError", "NodeAffinity", "OutOf")  # the kubelet would not take the pod

Action = Literal["RestartPod", "RestartSet", "RestartJob", "FailJob"]


@dataclass(frozen=True)
class Decision:
    """`elsewhere`: the node is to blame. `rule`: the job's rule that says so, by its name or place."""

    action: Action
    counted: bool
    elsewhere: bool = False
    rule: str = ""


def judge(draft: Draft) -> bool:
    """Look at the pods that have ended. True when the job has."""
    if _set_ended(draft):
        return True
    if not draft.stopping:
        _replace_rollouts(draft)
    return draft.terminal


def decide(pod: Pod, draft: Draft) -> Decision:
    """What follows from one pod's end: the first rule that matches, or else the table."""
    elsewhere = _verdict(pod) is Verdict.RESTART_ELSEWHERE
    reasons = {diagnose.ended(pod, draft.spec).reason}
    if pod.ended is not None:
        reasons |= {pod.ended.kube_reason, pod.ended.last_word.reason if pod.ended.last_word is not None else ""}
    code = pod.ended.exit_code if pod.ended is not None else None
    for index, rule in enumerate(draft.spec.failure_policy.rules):
        if (
            (not rule.roles or pod.role.value in rule.roles)
            and (not rule.exit_codes or code in rule.exit_codes)
            and (not rule.pod_conditions or set(rule.pod_conditions) & set(pod.conditions))
            and (not rule.reasons or set(rule.reasons) & reasons)
        ):
            return Decision(rule.action, rule.count, elsewhere, rule.name or f"failurePolicy.rules[{index}]")
    if _verdict(pod) is Verdict.FAIL:
        return Decision("FailJob", True)
    free = disrupted(pod) or pod.deleting or _verdict(pod) not in (Verdict.RESTART, Verdict.RESTART_ELSEWHERE)
    return Decision("RestartPod" if pod.role is Role.ROLLOUT else "RestartSet", not free, elsewhere and not free)


def act(draft: Draft, pod: Pod, decision: Decision) -> None:
    """Carry a decision about this pod out."""
    diagnosis = diagnose.ended(pod, draft.spec)
    if decision.rule:
        diagnosis = replace(diagnosis, message=f"{diagnosis.message} ({decision.action} by rule {decision.rule}.)")
    loss = Loss(pod.role, pod.index, diagnosis, pod)
    if decision.elsewhere:
        restart.exclude_node(draft, pod)
    if decision.action == "FailJob":
        restart.record(draft, loss, "FailJob", counted=True)
        draft.fail(loss.diagnosis.reason, loss.diagnosis.message)
    elif decision.action == "RestartJob":
        restart.restart_job(draft, loss, counted=decision.counted)
    elif decision.action == "RestartPod" and pod.role is Role.ROLLOUT:
        restart.replace_rollout(draft, pod, loss.diagnosis, counted=decision.counted)
    else:
        restart.restart_set(draft, loss, counted=decision.counted)


def disrupted(pod: Pod) -> bool:
    """Whether the cluster, not the job, ended the pod."""
    reason = pod.ended.kube_reason if pod.ended is not None else ""
    return bool(pod.disruption) or reason in DISRUPTIONS or reason.startswith(REFUSALS)


def _set_ended(draft: Draft) -> bool:
    """Success or failure of the job, or a restart of coordinator and trainers, from whoever of them ended or is gone."""
    ended = [pod for pod in draft.set_pods if pod.ended is not None and not draft.handled(pod)]
    coordinator = next((pod for pod in ended if pod.role is Role.COORDINATOR), None)
    if coordinator is not None and _verdict(coordinator) is Verdict.DONE:
        draft.succeed(_success(draft))
        return True
    fatal = [pod for pod in ended if decide(pod, draft).action == "FailJob"]
    if fatal:
        culprit = min(fatal, key=_rank)
        act(draft, culprit, decide(culprit, draft))
        return True
    if draft.stopping:
        return False
    lost = draft.missing if draft.status.complete_attempt == draft.attempt else []
    ended = [pod for pod in ended if pod.role is Role.COORDINATOR or not _was_told(draft, pod)]
    if not ended and not lost:
        return False
    if len(ended) + len(lost) < len(draft.members) and not lost and _second_word_may_come(draft, ended):
        return False
    best = min(ended, key=_rank, default=None)
    if best is None or (lost and not disrupted(best)):
        role, index = lost[0]
        restart.restart_set(draft, Loss(role, index, diagnose.deleted(role, index)), counted=False)
        return draft.terminal
    act(draft, best, decide(best, draft))
    return draft.terminal


def _replace_rollouts(draft: Draft) -> None:
    """Engines that ended, as many as the status can remember at a time."""
    for pod in draft.rollouts:
        over = pod.ended is not None and not pod.deleting
        if draft.handled(pod):
            draft.delete(pod)
        elif (over or pod.disruption) and not _was_told(draft, pod):
            if draft.room_for_failures <= 0:
                return draft.wake_in(1.0)
            decision = decide(pod, draft)
            act(draft, pod, decision)
            if draft.terminal or decision.action == "RestartJob":
                return None
            if over:
                draft.delete(pod)
    return None


def _verdict(pod: Pod) -> Verdict:
    """A pod whose process never ran, or whose end nobody knows, is a failure like any other."""
    code = pod.ended.exit_code if pod.ended is not None else None
    return Verdict.RESTART if code is None else verdict(code)


def _rank(pod: Pod) -> tuple[int, datetime, str, int]:
    """The best explanation first; among equals the earliest."""
    code = pod.ended.exit_code if pod.ended is not None else None
    finished = pod.ended.finished if pod.ended is not None else None
    if disrupted(pod) and _verdict(pod) is not Verdict.FAIL:
        rank = 1
    else:
        rank = 2 if code is None else explanation_rank(code)
        rank += rank > 0  # room for the disrupted
    return rank, finished or pod.created, pod.role.value, pod.index


def _was_told(draft: Draft, pod: Pod) -> bool:
    """A worker that ended with 0 was told to: the coordinator's end follows and decides. When it does not, the worker has to come back."""
    if pod.ended is None or _verdict(pod) is not Verdict.DONE:
        return False
    until = (pod.ended.finished or pod.created) + timedelta(seconds=TOLD_TO_STOP_SECONDS)
    if draft.now < until <= draft.now + timedelta(seconds=2 * TOLD_TO_STOP_SECONDS):
        draft.wake_at(until)
        return True
    return False


def _second_word_may_come(draft: Draft, ended: list[Pod]) -> bool:
    """Waiting for the others' word tells the cause from the consequence; bounded, also where clocks disagree."""
    until = min(pod.ended.finished or pod.created for pod in ended if pod.ended is not None)
    until += timedelta(seconds=SECOND_WORD_SECONDS)
    if draft.now < until <= draft.now + timedelta(seconds=2 * SECOND_WORD_SECONDS):
        draft.wake_at(until)
        return True
    return False


def _success(draft: Draft) -> str:
    progress = draft.status.progress
    if progress is None or progress.step is None:
        return "The training is complete."
    accuracy = f", accuracy {progress.accuracy:.3f}" if progress.accuracy is not None else ""
    return f"The training is complete: {progress.step} steps{accuracy}."
