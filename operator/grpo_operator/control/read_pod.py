"""From a Pod of the API to `facts.Pod`.

Invariant: total: a pod that somebody has changed by hand, or that a newer Kubernetes wrote, is read as far as it goes; no decision here.
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from grpo_operator import clock
from grpo_operator.facts import Ended, LastWord, Pod, Waiting
from grpo_operator.labels import ATTEMPT, CONTAINER, INDEX, ROLE, Role

_LONG_AGO = datetime.fromtimestamp(0, UTC)
_REASON = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")  # it becomes a condition's reason and a metric's label


def read_pod(document: Mapping[str, Any]) -> Pod:
    """Raises ValueError when the labels do not say which pod of a job it is."""
    metadata, spec, status = (document.get(key) or {} for key in ("metadata", "spec", "status"))
    labels = metadata.get("labels") or {}
    try:
        role, index, attempt = Role(labels[ROLE]), int(labels[INDEX]), int(labels[ATTEMPT])
    except (KeyError, ValueError) as error:
        raise ValueError(f"pod {metadata.get('name')}: no valid label {error}") from None
    conditions = {condition.get("type", ""): condition for condition in status.get("conditions") or []}
    true = tuple(sorted(name for name, condition in conditions.items() if condition.get("status") == "True"))
    scheduled = conditions.get("PodScheduled", {})
    containers = _containers(status)
    worker = containers.get(CONTAINER, {}).get("state") or {}
    return Pod(
        name=metadata.get("name", ""),
        uid=metadata.get("uid", ""),
        role=role,
        index=index,
        attempt=attempt,
        created=clock.parse(metadata.get("creationTimestamp")) or _LONG_AGO,
        phase=status.get("phase") or "Pending",
        ip=status.get("podIP") or "",
        node=spec.get("nodeName") or "",
        config=_config_map(spec),
        scheduled="PodScheduled" in true or bool(spec.get("nodeName")),
        unschedulable=scheduled.get("message") or scheduled.get("reason") or ""
        if scheduled.get("status") == "False"
        else "",
        started="running" in worker or bool((worker.get("terminated") or {}).get("startedAt")),
        ready="Ready" in true,
        waiting=_waiting(containers),
        ended=_ended(status, containers),
        disruption=conditions["DisruptionTarget"].get("reason") or "DisruptionTarget"
        if "DisruptionTarget" in true
        else "",
        conditions=true,
        deletion_deadline=clock.parse(metadata.get("deletionTimestamp")),
    )


def _containers(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Statuses by container name, those of init containers first."""
    return {
        item.get("name", ""): item
        for key in ("initContainerStatuses", "containerStatuses")
        for item in status.get(key) or []
    }


def _config_map(spec: Mapping[str, Any]) -> str:
    for volume in spec.get("volumes") or []:
        if volume.get("name") == "config":
            return (volume.get("configMap") or {}).get("name") or ""
    return ""


def _waiting(containers: Mapping[str, Mapping[str, Any]]) -> Waiting | None:
    """The first container that waits for more than the one before it."""
    found = None
    for container in containers.values():
        state = (container.get("state") or {}).get("waiting")
        if state:
            waiting = Waiting(state.get("reason") or "", state.get("message") or "")
            if waiting.reason not in ("PodInitializing", "ContainerCreating", ""):
                return waiting
            found = found or waiting
    return found


def _ended(status: Mapping[str, Any], containers: Mapping[str, Mapping[str, Any]]) -> Ended | None:
    terminated = _terminated(status, containers)
    over = status.get("phase") in ("Succeeded", "Failed")
    if terminated is None:
        if not over:
            return None
        reason = status.get("reason") or "Error"
        return Ended(None, reason, None, None, status.get("message") or "")
    said = terminated.get("message") or ""
    last_word = _last_word(said)
    return Ended(
        exit_code=terminated.get("exitCode"),
        kube_reason=status.get("reason") or terminated.get("reason") or "Error",
        finished=clock.parse(terminated.get("finishedAt")),
        last_word=last_word,
        message=status.get("message") or ("" if last_word else said),
    )


def _terminated(status: Mapping[str, Any], containers: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """How the worker ended, or what did not let it start: an init container that failed, or whatever ended a pod in which it never ran.
    While the worker lives, the end of a container beside it (a mesh's proxy, a log collector) says nothing of it."""
    states = {name: container.get("state") or {} for name, container in containers.items()}
    worker = states.get(CONTAINER, {})
    if "terminated" in worker or "running" in worker:
        return worker.get("terminated")
    over = status.get("phase") in ("Succeeded", "Failed")
    blocking = list(states) if over else [item.get("name", "") for item in status.get("initContainerStatuses") or []]
    failed = (states[name].get("terminated") or {} for name in blocking)
    return next((state for state in failed if state.get("exitCode")), None)


def _last_word(text: str) -> LastWord | None:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):  # any image may have written it
        return None
    if not isinstance(said, dict) or not isinstance(said.get("reason"), str) or not _REASON.fullmatch(said["reason"]):
        return None
    step, checkpoint = said.get("step"), said.get("checkpoint")
    return LastWord(
        reason=said["reason"],
        message=str(said.get("message") or ""),
        step=step if isinstance(step, int) else None,
        checkpoint=checkpoint if isinstance(checkpoint, str) else None,
        progress=said,
    )
