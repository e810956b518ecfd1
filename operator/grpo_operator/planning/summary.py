"""The part of the status that follows from the rest: conditions, roles, and the line for people.

Invariant: computed last and anew each time, from pods, report and what the policies decided. Of what it writes, policies read only
Succeeded, Failed, Suspended and Restarting, which they set themselves.
"""

from typing import Literal

from grpo_operator import clock
from grpo_operator.facts import Pod
from grpo_operator.labels import JOB, ROLE, Role
from grpo_operator.planning import conditions, diagnose
from grpo_operator.planning.draft import Draft
from grpo_worker.config.status import ConditionType, RoleStatus, RolloutScale, State, Summary

_SET_BY_POLICIES: tuple[ConditionType, ...] = ("Suspended", "Succeeded", "Failed", "Restarting")
_OF_PODS: tuple[ConditionType, ...] = ("Scheduled", "Ready", "Progressing")
_IDLE: tuple[Literal["Succeeded", "Failed", "Suspended"], ...] = ("Succeeded", "Failed", "Suspended")
_USUAL = ("PodsMissing", "Pending", "PodsNotReady")  # reasons of any start
_WORDS: dict[str, State] = {
    "Training": "Training",
    "Validating": "Validating",
    "Saving": "Saving",
    "Stopping": "Stopping",
}


def summarize(draft: Draft) -> None:
    if draft.job.spec is not None:
        _roles(draft)
    _conditions(draft)
    state = _state(draft)
    draft.update(state=state, message=_message(draft, state), observed_generation=draft.job.generation)


def _present(draft: Draft) -> list[Pod]:
    """The pods that the job wants and has."""
    return [pod for pod in (*draft.set_pods, *draft.rollouts) if pod.ended is None]


def _roles(draft: Draft) -> None:
    known = {role.name: role.restarts or 0 for role in draft.status.roles or []}
    desired = {Role.COORDINATOR: 1, Role.TRAINER: draft.spec.trainer.nodes, Role.ROLLOUT: draft.spec.rollout_pods}
    ready = {role: sum(pod.role is role and pod.ready and not pod.deleting for pod in _present(draft)) for role in Role}
    draft.update(
        roles=[
            RoleStatus(name=role.value, desired=desired[role], ready=ready[role], restarts=known.get(role.value, 0))
            for role in Role
        ],
        summary=Summary(
            trainers=f"{ready[Role.TRAINER]}/{desired[Role.TRAINER]}",
            rollouts=f"{ready[Role.ROLLOUT]}/{desired[Role.ROLLOUT]}",
        ),
        rollout=RolloutScale(
            replicas=sum(pod.role is Role.ROLLOUT and pod.ended is None for pod in draft.seen.pods),
            selector=f"{JOB}={draft.job.name},{ROLE}={Role.ROLLOUT.value}",
        ),
    )


def _conditions(draft: Draft) -> None:
    for kind in _SET_BY_POLICIES:
        known = conditions.find(draft.status, kind)
        value: conditions.Value = "False"
        reason, message = "NotYet" if kind in ("Succeeded", "Failed") else f"Not{kind}", ""
        if known is not None:
            value, reason, message = known.status, known.reason or reason, known.message or ""
        if kind == "Restarting" and value == "True" and (draft.terminal or draft.trains):
            value, reason, message = "False", "Restarted" if draft.trains else "Finished", ""
        draft.condition(kind, value, reason, message)
    idle = _idle(draft)
    if idle:
        for kind in _OF_PODS:
            draft.condition(kind, "False", *idle)
    elif draft.job.spec is not None:
        _scheduled(draft)
        _ready(draft)
        _progressing(draft)
    if draft.job.spec is not None:
        _checkpoint_current(draft)
    elif conditions.find(draft.status, "CheckpointCurrent") is None:
        draft.condition("CheckpointCurrent", "Unknown", "NoneYet")


def _idle(draft: Draft) -> tuple[str, str] | None:
    """Reason and message of a job that is to have no pods."""
    for kind in _IDLE:
        if conditions.holds(draft.status, kind):
            found = conditions.find(draft.status, kind)
            return kind, (found.message or "") if found is not None else ""
    return None


def _scheduled(draft: Draft) -> None:
    there = {(pod.role, pod.index): pod for pod in _present(draft)}
    waiting = [pod for pod in there.values() if not pod.scheduled]
    stuck = next((found for pod in waiting if (found := diagnose.not_started(pod, draft.spec)) is not None), None)
    stuck = stuck or next(map(diagnose.refused, draft.refusals), None)
    if stuck is not None:
        _announce(draft, "Scheduled", stuck)
        draft.condition("Scheduled", "False", stuck.reason, stuck.message)
    elif missing := [member for member in draft.wanted if member not in there]:
        names = ", ".join(draft.pod_name(*member) for member in missing)
        draft.condition("Scheduled", "False", "PodsMissing", f"To be made: {names}.")
    elif waiting:
        draft.condition("Scheduled", "False", "Pending", f"{len(waiting)} pods wait for the scheduler.")
    else:
        draft.condition("Scheduled", "True", "AllScheduled", "All pods have a node.")


def _ready(draft: Draft) -> None:
    there = {(pod.role, pod.index): pod for pod in _present(draft)}
    unready = [member for member in draft.wanted if member not in there or not there[member].ready]
    found = next(
        (
            found
            for pod in there.values()
            if pod.scheduled and (found := diagnose.not_started(pod, draft.spec)) is not None
        ),
        None,
    )
    if found is not None:
        _announce(draft, "Ready", found)
        draft.condition("Ready", "False", found.reason, found.message)
    elif unready:
        names = ", ".join(draft.pod_name(*member) for member in unready)
        draft.condition("Ready", "False", "PodsNotReady", f"Not ready: {names}.")
    else:
        draft.condition("Ready", "True", "AllReady", "All pods are ready.")


def _announce(draft: Draft, kind: ConditionType, found: diagnose.Diagnosis) -> None:
    """An event when the reason is new, not at each visit."""
    before = conditions.find(draft.seen.job.status, kind)
    if before is None or before.reason != found.reason:
        draft.warning(found.reason, found.message)


def _progressing(draft: Draft) -> None:
    document = draft.report
    before = conditions.find(draft.status, "Progressing")
    if before is not None and _not_heard_of(draft):
        draft.condition("Progressing", "True", before.reason or "Training", before.message or "")
        return
    if document is not None and draft.trains:
        if not conditions.holds(draft.status, "Progressing"):
            first = draft.job.status.progress is None
            step = document.get("step")
            draft.normal("Training", "Training begins." if first else f"Training goes on after step {step}.")
        words = str(document.get("message") or "")
        draft.condition("Progressing", "True", str(document.get("state")), words)
        return
    if draft.job.spec is not None and draft.stopping:
        draft.condition("Progressing", "False", "Stopping", "The coordinator saves and stops.")
    elif conditions.holds(draft.status, "Restarting"):
        draft.condition("Progressing", "False", "Restarting", "Starting again from the last checkpoint.")
    else:
        words = str(document.get("message") or "") if document is not None else ""
        draft.condition("Progressing", "False", "Starting", words)


def _not_heard_of(draft: Draft) -> bool:
    """The operator has started anew, or the coordinator is hard to reach: what is known of it stays until it stalls or ends."""
    coordinator = draft.coordinator
    lives = coordinator is not None and coordinator.started and coordinator.ended is None
    goes_on = conditions.holds(draft.status, "Progressing") and not conditions.holds(draft.status, "Restarting")
    return draft.report is None and lives and goes_on and not draft.stopping


def _checkpoint_current(draft: Draft) -> None:
    """True while no more than two intervals of steps would be lost: the one under way, and one whose save is not complete."""
    frequency = draft.spec.checkpoint.save_freq
    step = (draft.status.progress.step if draft.status.progress is not None else None) or 0
    last = draft.status.checkpoints.last_step if draft.status.checkpoints is not None else None
    if conditions.holds(draft.status, "Succeeded") and last is not None:
        draft.condition("CheckpointCurrent", "True", "Final", f"Step {last}.")
    elif not frequency:
        draft.condition("CheckpointCurrent", "Unknown", "SavesAtTheEnd", "checkpoint.saveFreq is 0.")
    elif step - (last or 0) > 2 * frequency:
        behind = f"step {last}" if last is not None else "none"
        draft.condition(
            "CheckpointCurrent", "False", "Behind", f"The last checkpoint is {behind}; training is at step {step}."
        )
    elif last is None:
        draft.condition("CheckpointCurrent", "Unknown", "NoneYet", f"The first is due after step {frequency}.")
    else:
        draft.condition("CheckpointCurrent", "True", "Current", f"Step {last}.")


def _state(draft: Draft) -> State:
    for kind in _IDLE:
        if conditions.holds(draft.status, kind):
            return kind
    if draft.job.spec is not None and draft.stopping:
        return "Suspending" if draft.spec.suspend else "Stopping"
    if conditions.holds(draft.status, "Restarting"):
        return "Restarting"
    progressing = conditions.find(draft.status, "Progressing")
    if progressing is not None and progressing.status == "True":
        return _WORDS.get(progressing.reason or "", "Training")
    started = draft.job.spec is not None and all(pod.started for pod in _present(draft)) and not draft.missing
    return "Starting" if started else "Pending"


def _message(draft: Draft, state: State) -> str:
    """What a person wants to know first."""
    if state == "Succeeded" or state == "Failed" or state == "Suspended" or state == "Restarting":
        return _with_back_off(draft, state, _words(draft, state))
    if state in ("Pending", "Starting"):
        lacking = [
            condition
            for condition in draft.status.conditions or []
            if condition.type in ("Scheduled", "Ready") and condition.status == "False" and condition.message
        ]
        lacking.sort(key=lambda condition: condition.reason in _USUAL)  # what somebody has to mend comes first
        if lacking:
            return lacking[0].message or ""
    return _words(draft, "Progressing")


def _words(draft: Draft, kind: ConditionType) -> str:
    found = conditions.find(draft.status, kind)
    return (found.message or "") if found is not None else ""


def _with_back_off(draft: Draft, state: State, message: str) -> str:
    due = clock.parse(draft.budget.not_before)
    if state == "Restarting" and due is not None and draft.now < due:
        return f"{message} Not before {draft.budget.not_before}."
    return message
