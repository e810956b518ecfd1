"""`grpo status` as text: the table of jobs, and the snapshot of one.

Invariant: pure functions of what the API server holds and the present time; a missing value is a dash, never 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_operator.cli.reading import (
    Job,
    condition,
    ended,
    entries,
    failure_code,
    name_of,
    number,
    part,
    seconds,
    status_of,
    suspend_asked,
)
from grpo_operator.labels import JOB
from grpo_worker.errors import ExitCode, one_line

DASH = "–"
SHOWN_FAILURES = 3
LABEL_WIDTH = 12
# The status of each condition that a person has to look at, while the job is meant to run.
_WRONG = {
    "Scheduled": "False",
    "Ready": "False",
    "Progressing": "False",
    "CheckpointCurrent": "False",
    "Restarting": "True",
}
_CORRECTABLE = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG})

Say = Callable[[str], str]  # a command of ours, with the options that reach this cluster


def age(since: float | None, now: float) -> str:
    """`12s`, `5m40s`, `3h10m`, `2d4h`, as kubectl writes it."""
    if since is None:
        return DASH
    return duration(now - since)


def duration(length_seconds: float | int | None) -> str:
    if length_seconds is None:
        return DASH
    whole = max(0, int(length_seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def table(jobs: Sequence[Job], now: float, *, namespaces: bool) -> str:
    """One line a job, with the columns of `kubectl get grpojobs`."""
    head = [*(["NAMESPACE"] if namespaces else []), "NAME", "STATE", "STEP", "EPOCH", "REWARD", "CHECKPOINT"]
    head += ["TRAINERS", "ROLLOUTS", "RESTARTS", "AGE"]
    rows = [head, *(_row(job, now, namespaces) for job in sorted(jobs, key=_key))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def snapshot(job: Job, now: float, say: Say) -> str:
    """State, progress, pods, what is wrong, and what to do next."""
    status = status_of(job)
    namespace = part(job, "metadata").get("namespace")
    lines = [f"{name_of(job)}  {status.get('state') or 'Pending'}  (namespace {namespace})"]
    if message := status.get("message"):
        lines.append(str(message))
    lines.append("")
    lines += _labelled("progress", [_progress(status)])
    lines += _labelled("checkpoint", [_checkpoint(part(status, "checkpoints"), now)])
    lines += _labelled("pods", [_roles(status)])
    lines += _labelled("restarts", [_restarts(job)])
    lines += _labelled("wrong", wrong(job))
    lines += _labelled("failures", [_failure(entry, now) for entry in entries(status, "failures")[:SHOWN_FAILURES]])
    lines += _labelled("next", next_steps(job, say))
    return "\n".join(lines)


def wrong(job: Job) -> list[str]:
    """The conditions that are not as they should be."""
    end = ended(job)
    if end is not None and end.state != "Failed":
        return []
    if end is not None:
        return [_condition(condition(job, "Failed"))]
    found = [condition(job, kind) for kind, status in _WRONG.items() if condition(job, kind).get("status") == status]
    if suspend_asked(job):  # its pods are meant to be away
        found = [entry for entry in found if entry.get("type") in ("CheckpointCurrent", "Restarting")]
    return [_condition(entry) for entry in found]


def next_steps(job: Job, say: Say) -> list[str]:
    """What a person may want to do."""
    name, status, end = name_of(job), status_of(job), ended(job)
    delete = f"kubectl delete grpojob {name} -n {part(job, 'metadata').get('namespace')}"
    if end is not None and end.state == "Succeeded":
        return [f"{delete}   (its checkpoints stay)"]
    if end is not None and end.state == "Suspended":
        return [say(f"resume {name}")]
    if end is not None:
        failures = entries(status, "failures")
        role = failures[0].get("role") if failures else None
        look = [say(f"logs {name} --role {role}")] if role else []
        if failure_code(job) in _CORRECTABLE:
            look.append(f"correct what the message names; {delete}; {say('submit FILE')}")
        else:
            look.append(f"to try again: {delete}; {say('submit FILE')}")
        return look
    if not entries(status, "conditions"):
        return ["No operator has looked at this job yet. Is the operator running, and does it watch this namespace?"]
    if suspend_asked(job):
        return [say(f"status {name} --follow")]
    if condition(job, "Scheduled").get("status") == "False":
        return [f"kubectl describe pods -n {part(job, 'metadata').get('namespace')} -l {JOB}={name}"]
    return [say(f"status {name} --follow"), say(f"logs {name} -f"), say(f"stop {name}")]


def _key(job: Job) -> tuple[str, str]:
    metadata = part(job, "metadata")
    return str(metadata.get("namespace")), str(metadata.get("name"))


def _row(job: Job, now: float, namespaces: bool) -> list[str]:
    metadata, status = part(job, "metadata"), status_of(job)
    progress, summary = part(status, "progress"), part(status, "summary")
    step, total = number(progress, "step"), number(progress, "totalSteps")
    return [
        *([str(metadata.get("namespace"))] if namespaces else []),
        name_of(job),
        str(status.get("state") or DASH),
        DASH if step is None else f"{step}/{total}" if total else f"{step}",
        _number(number(progress, "epoch"), 2),
        _number(number(progress, "reward"), 3),
        _number(number(part(status, "checkpoints"), "lastStep"), 0),
        str(summary.get("trainers") or DASH),
        str(summary.get("rollouts") or DASH),
        _number(number(status, "restarts"), 0),
        age(seconds(metadata.get("creationTimestamp")), now),
    ]


def _number(value: float | int | None, digits: int) -> str:
    return DASH if value is None else f"{value:,.{digits}f}"


def _labelled(label: str, values: Sequence[str]) -> list[str]:
    shown = [value for value in values if value]
    return [
        f"{label if first else '':<{LABEL_WIDTH}}{value}"
        for first, value in zip([True] + [False] * len(shown), shown, strict=False)
    ]


def _progress(status: Mapping[str, Any]) -> str:
    progress = part(status, "progress")
    step, total = number(progress, "step"), number(progress, "totalSteps")
    if step is None:
        return DASH
    epoch, epochs = number(progress, "epoch"), number(progress, "totalEpochs")
    parts = [f"step {step}" + (f"/{total}" if total else "")]
    if epoch is not None:
        parts.append(f"epoch {epoch:.2f}" + (f"/{epochs:g}" if epochs else ""))
    for key, words in (
        ("reward", "reward {:.3f}"),
        ("accuracy", "accuracy {:.3f}"),
        ("tokensPerSecond", "{:,.0f} tokens/s"),
    ):
        if (value := number(progress, key)) is not None:
            parts.append(words.format(value))
    if (left := number(progress, "etaSeconds")) is not None and status.get("state") not in ("Succeeded", "Failed"):
        parts.append(f"{duration(left)} to go")
    return ", ".join(parts)


def _checkpoint(saved: Mapping[str, Any], now: float) -> str:
    if (step := number(saved, "lastStep")) is None:
        return "none yet"
    written = seconds(saved.get("time"))
    parts = [f"step {step}", f"{age(written, now)} ago" if written is not None else "", str(saved.get("path") or "")]
    kept = [f"{step}" for entry in entries(saved, "kept") if (step := number(entry, "step")) is not None]
    return ", ".join(text for text in parts if text) + (f" (kept: {', '.join(kept)})" if kept else "")


def _roles(status: Mapping[str, Any]) -> str:
    roles = [
        f"{role.get('name')} {_number(number(role, 'ready'), 0)}/{_number(number(role, 'desired'), 0)} ready"
        + (f" ({restarts} replaced)" if (restarts := number(role, "restarts")) else "")
        for role in entries(status, "roles")
    ]
    return ", ".join(roles) or DASH


def _restarts(job: Job) -> str:
    status = status_of(job)
    counted, uncounted = number(status, "restarts"), number(status, "uncountedRestarts")
    if not counted and not uncounted:
        return ""
    text = f"{counted or 0} counted, {uncounted or 0} not counted"
    limit, used = number(part(job, "spec", "failurePolicy"), "maxRestarts"), number(part(status, "budget"), "counted")
    if limit is not None and used is not None:
        text += f"; {used} of {limit} since the last progress"
    return text


def _condition(entry: Mapping[str, Any]) -> str:
    words = ": ".join(str(entry[key]) for key in ("reason", "message") if entry.get(key))
    return f"{entry.get('type')} is {entry.get('status')}" + (f": {words}" if words else "")


def _failure(entry: Mapping[str, Any], now: float) -> str:
    code = entry.get("exitCode")
    ended_with = [f"exit code {code}" if code is not None else "", str(entry.get("reason") or "")]
    message = one_line(str(entry.get("message") or ""))
    then = f" -> {entry.get('action')}" + ("" if entry.get("counted") in (None, True) else ", not counted")
    return (
        f"{age(seconds(entry.get('time')), now)} ago  {entry.get('pod') or DASH}: {' '.join(filter(None, ended_with)) or 'ended'}"
        + (f": {message}" if message else "")
        + (then if entry.get("action") else "")
    )
