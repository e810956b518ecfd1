"""A GRPOJob and its Kubernetes Events, as the view of `grpo run` takes them: the coordinator's `/status` document and run events.

Invariant: pure; what the GRPOJob's status does not carry (timing of a step, staleness, KL, response length) is left out, never made up.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from grpo_operator.cli.reading import Job, entries, name_of, number, part, seconds, status_of

# View's key: key of status.progress.
_PROGRESS = {
    "step": "step",
    "total_steps": "totalSteps",
    "epoch": "epoch",
    "total_epochs": "totalEpochs",
    "reward": "reward",
    "accuracy": "accuracy",
    "policy_version": "policyVersion",
    "tokens_per_second": "tokensPerSecond",
    "eta_seconds": "etaSeconds",
}


def view_status(job: Job) -> dict[str, Any]:
    """The coordinator's `/status` document, as far as the GRPOJob's status tells it."""
    status = status_of(job)
    progress, saved = part(status, "progress"), part(status, "checkpoints")
    document: dict[str, Any] = {
        "name": name_of(job),
        "state": status.get("state") or "Pending",
        "message": status.get("message"),
        "incarnation": status.get("attempt"),
        "started_time": seconds(status.get("startTime")),
        "last_progress_time": seconds(progress.get("lastProgressTime")),
        "members": [_role(role, progress) for role in entries(status, "roles")],
        **{ours: number(progress, theirs) for ours, theirs in _PROGRESS.items()},
    }
    if (step := number(saved, "lastStep")) is not None:
        document["checkpoint"] = {"step": step, "path": saved.get("path"), "time": seconds(saved.get("time"))}
    return {key: value for key, value in document.items() if value is not None}


def view_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """A core/v1 Event as a run event."""
    return {
        "time": event_time(event),
        "role": "operator",
        "level": "warning" if event.get("type") == "Warning" else "info",
        "reason": str(event.get("reason") or ""),
        "message": str(event.get("message") or ""),
    }


def event_time(event: Mapping[str, Any]) -> float:
    """When the event last happened (events of both APIs, events.k8s.io and core, are read through core/v1)."""
    candidates = (
        part(event, "series").get("lastObservedTime"),
        event.get("lastTimestamp"),
        event.get("eventTime"),
        event.get("firstTimestamp"),
        part(event, "metadata").get("creationTimestamp"),
    )
    return next((moment for text in candidates if (moment := seconds(text)) is not None), 0.0)


def new_events(events: Iterable[Mapping[str, Any]], seen: dict[str, float]) -> list[Mapping[str, Any]]:
    """Those that are new, or happened again, since the last call with the same `seen`; oldest first."""
    fresh = []
    for event in events:
        uid, count = str(part(event, "metadata").get("uid")), _count(event)
        if seen.get(uid) != count:
            seen[uid] = count
            fresh.append(event)
    return sorted(fresh, key=event_time)


def _count(event: Mapping[str, Any]) -> float:
    return number(part(event, "series"), "count") or number(event, "count") or 1


def _role(role: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, Any]:
    """A role as one row of the view's members."""
    ready, desired = role.get("ready"), role.get("desired")
    row: dict[str, Any] = {"role": role.get("name"), "name": role.get("name")}
    if ready is not None and desired is not None:
        row["state"] = f"{ready}/{desired} ready"
    if role.get("name") == "rollout":
        row["weight_version"] = number(progress, "rolloutVersion")
    elif role.get("name") == "trainer":
        row["weight_version"] = number(progress, "policyVersion")
    return row
