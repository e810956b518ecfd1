"""Carries out a restart: charges it, writes it into the status, and says so.

Invariant: the status alone makes a restart happen. Its new attempt turns the pods of the old one into leftovers, in this plan or in any
later one, so it is charged once wherever the operator dies.
"""

from dataclasses import dataclass
from datetime import timedelta

from grpo_operator import clock
from grpo_operator.facts import Pod
from grpo_operator.labels import Role, member_name
from grpo_operator.planning.diagnose import Diagnosis
from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import budget
from grpo_worker.config.status import ExcludedNode, Failure, RoleStatus

EXCLUDED_SECONDS = 3600.0  # that a node with failed hardware is left out


@dataclass(frozen=True)
class Loss:
    """What was lost: a member of the job, why, and the pod that it was, if there is one still."""

    role: Role
    index: int
    diagnosis: Diagnosis
    pod: Pod | None = None

    @property
    def exit_code(self) -> int | None:
        return self.pod.ended.exit_code if self.pod is not None and self.pod.ended is not None else None


def restart_set(draft: Draft, loss: Loss, *, counted: bool) -> None:
    """Coordinator and trainers start again from the last checkpoint; engines stay."""
    _restart(draft, loss, "RestartSet", counted)


def restart_job(draft: Draft, loss: Loss, *, counted: bool) -> None:
    """All pods start again."""
    _restart(draft, loss, "RestartJob", counted)


def replace_rollout(draft: Draft, pod: Pod, diagnosis: Diagnosis, *, counted: bool) -> None:
    """A rollout pod is made again; the others go on."""
    loss = Loss(pod.role, pod.index, diagnosis, pod)
    part = budget.same_failure(draft.budget, pod.created)
    if not part:
        charged = budget.charge(
            draft.budget, "rollout", counted=counted, policy=draft.spec.failure_policy, now=draft.now
        )
        if charged.exhausted:
            _give_up(draft, loss, counted)
            return
        draft.update(budget=charged.budget)
    record(draft, loss, "RestartPod", counted=counted and not part)
    _add_restarts(draft, {Role.ROLLOUT})
    draft.warning(loss.diagnosis.reason, f"{loss.diagnosis.sentence} Replacing it; training goes on.")


def exclude_node(draft: Draft, pod: Pod) -> None:
    """Keep the job off the node of a pod whose hardware failed."""
    if not pod.node:
        return
    until = clock.text(draft.now + timedelta(seconds=EXCLUDED_SECONDS))
    others = [node for node in draft.status.excluded_nodes or [] if node.name != pod.node]
    draft.update(excluded_nodes=[*others, ExcludedNode(name=pod.node, until=until)])


def record(draft: Draft, loss: Loss, action: str, *, counted: bool) -> None:
    draft.record(
        Failure(
            time=clock.text(draft.now),
            pod=draft.pod_name(loss.role, loss.index),
            pod_uid=loss.pod.uid if loss.pod is not None else None,
            role=loss.role.value,
            exit_code=loss.exit_code,
            reason=loss.diagnosis.reason,
            message=loss.diagnosis.message,
            action=action,
            counted=counted,
        )
    )


def _restart(draft: Draft, loss: Loss, action: str, counted: bool) -> None:
    whole = action == "RestartJob"
    charged = budget.charge(draft.budget, "set", counted=counted, policy=draft.spec.failure_policy, now=draft.now)
    if charged.exhausted:
        _give_up(draft, loss, counted)
        return
    record(draft, loss, action, counted=counted)
    attempt, limits = draft.attempt + 1, charged.budget
    if whole:
        limits = limits.model_copy(update={"rollout_not_before": limits.not_before})
    draft.update(
        attempt=attempt,
        rollout_attempt=attempt if whole else draft.status.rollout_attempt,
        restarts=(draft.status.restarts or 0) + counted,
        uncounted_restarts=(draft.status.uncounted_restarts or 0) + (not counted),
        budget=limits,
    )
    _add_restarts(draft, set(Role) if whole else {Role.COORDINATOR, Role.TRAINER})
    step = draft.status.checkpoints.last_step if draft.status.checkpoints is not None else None
    origin = f"from the checkpoint of step {step}" if step is not None else "from the start"
    what = "all pods" if whole else "coordinator and trainers"
    draft.condition("Restarting", "True", loss.diagnosis.reason, f"{loss.diagnosis.sentence} Attempt {attempt}.")
    draft.warning(loss.diagnosis.reason, f"{loss.diagnosis.sentence} Restarting {what} {origin}.")


def _give_up(draft: Draft, loss: Loss, counted: bool) -> None:
    limit = draft.spec.failure_policy.max_restarts
    times = f"{limit} restart{'s' * (limit != 1)}"
    count = f"after {times} without progress (failurePolicy.maxRestarts)" if counted else "again and again"
    record(draft, loss, "FailJob", counted=counted)
    draft.fail(loss.diagnosis.reason, f"{member_name(loss.role, loss.index)} failed {count}. {loss.diagnosis.message}")


def _add_restarts(draft: Draft, roles: set[Role]) -> None:
    known = {role.name: role for role in draft.status.roles or []}
    draft.update(
        roles=[
            (known.get(role.value) or RoleStatus(name=role.value)).model_copy(
                update={"restarts": _restarts(known.get(role.value)) + (role in roles)}
            )
            for role in Role
        ]
    )


def _restarts(role: RoleStatus | None) -> int:
    return (role.restarts or 0) if role is not None else 0
