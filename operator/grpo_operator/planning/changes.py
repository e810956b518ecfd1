"""Whether a status is worth a write.

Invariant: what anybody decides or waits on is written at once; what a progressing job changes all the time (progress, checkpoints, words)
at most once in `INTERVAL_SECONDS`, but for the first step and the last.
"""

from datetime import datetime, timedelta
from typing import Any

from grpo_operator import clock
from grpo_worker.config.status import GRPOJobStatus

INTERVAL_SECONDS = 10.0


def due(before: GRPOJobStatus, after: GRPOJobStatus, now: datetime) -> datetime | None:
    """When `after` is to be written: `now`, later, or None when nothing changed."""
    if _lasting(before) != _lasting(after):
        return now
    if _volatile(before) == _volatile(after):
        return None
    if _milestone(before, after):
        return now
    written = clock.parse(before.progress.report_time) if before.progress is not None else None
    return now if written is None else max(now, min(written, now) + timedelta(seconds=INTERVAL_SECONDS))


def _lasting(status: GRPOJobStatus) -> dict[str, Any]:
    document = status.model_dump(exclude={"progress", "checkpoints", "message", "conditions", "budget"})
    document["conditions"] = {
        condition.type: (condition.status, condition.reason, condition.observed_generation)
        for condition in status.conditions or []
    }
    document["budget"] = status.budget.model_dump(exclude={"step"}) if status.budget is not None else None
    document["saved"] = status.checkpoints is not None
    return document


def _volatile(status: GRPOJobStatus) -> dict[str, Any]:
    document = status.model_dump(include={"checkpoints", "message", "budget"})
    document["progress"] = status.progress.model_dump(exclude={"report_time"}) if status.progress is not None else None
    document["words"] = [condition.message for condition in status.conditions or []]
    return document


def _milestone(before: GRPOJobStatus, after: GRPOJobStatus) -> bool:
    old, new = (status.progress for status in (before, after))
    if new is None or new.step is None:
        return False
    first = not (old.step if old is not None else None) and new.step > 0
    last = new.step == new.total_steps and (old is None or old.step != new.step)
    return first or last
