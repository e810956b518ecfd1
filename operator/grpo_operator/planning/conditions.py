"""The conditions of a job as a list: read one, put one.

Invariant: one entry a type, in the order of `TYPES`; lastTransitionTime changes when, and only when, status does.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, get_args

from grpo_operator import clock
from grpo_worker.config.status import Condition, ConditionType, GRPOJobStatus

Value = Literal["True", "False", "Unknown"]
TYPES: tuple[ConditionType, ...] = get_args(ConditionType)
_LONGEST_MESSAGE = 4096


def find(status: GRPOJobStatus, kind: ConditionType) -> Condition | None:
    return next((condition for condition in status.conditions or [] if condition.type == kind), None)


def holds(status: GRPOJobStatus, kind: ConditionType) -> bool:
    condition = find(status, kind)
    return condition is not None and condition.status == "True"


def since(status: GRPOJobStatus, kind: ConditionType) -> datetime | None:
    """When it last changed."""
    condition = find(status, kind)
    return clock.parse(condition.last_transition_time) if condition is not None else None


def with_condition(
    conditions: Sequence[Condition] | None,
    kind: ConditionType,
    status: Value,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
) -> list[Condition]:
    """`conditions` with this one in place of its predecessor."""
    known = {condition.type: condition for condition in conditions or []}
    before = known.get(kind)
    same = before is not None and before.status == status
    known[kind] = Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message[:_LONGEST_MESSAGE],
        last_transition_time=before.last_transition_time if before is not None and same else clock.text(now),
        observed_generation=generation,
    )
    return [known[kind] for kind in TYPES if kind in known]
