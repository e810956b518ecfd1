"""Reading a GRPOJob as a person's command does: tolerantly.

Invariant: pure; every part of the status may be missing or newer than this program, and then it is shown as absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from grpo_worker.errors import BY_EXIT_CODE, ExitCode, GRPOError, YieldedError

Job = Mapping[str, Any]

# Reasons of the error classes, with their codes: `Failed` carries the reason of what ended the job.
_CODES = {kind.reason: kind.exit_code for kind in BY_EXIT_CODE.values()} | {
    "InvalidJob": ExitCode.USAGE,
    "InvalidSpec": ExitCode.USAGE,
    "InvalidImageName": ExitCode.CONFIG,
    "DeadlineExceeded": ExitCode.CONFIG,  # as under `grpo run`
}
_NO_FAILURE = frozenset({ExitCode.DONE, ExitCode.YIELDED})


class JobFailed(GRPOError):
    """The job ended without success; the exit code is that of the failure."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class JobEnded:
    """A job that is not going to do more by itself."""

    state: str  # Succeeded, Failed, Suspended
    exit_code: ExitCode
    message: str

    def raise_failure(self, name: str, go_on: str) -> None:
        """Raises JobFailed or YieldedError, unless the job succeeded. `go_on`: the command that resumes it."""
        if self.state == "Failed":
            raise JobFailed(f"{name} failed: {self.message}", self.exit_code)
        if self.state == "Suspended":
            raise YieldedError(f"{name} is suspended; its state is saved. It goes on with: {go_on}")


def part(document: Mapping[str, Any] | None, *keys: str) -> Mapping[str, Any]:
    """A nested mapping, empty where any of it is missing."""
    node: Any = document
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}


def entries(document: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A list of mappings, empty where it is missing."""
    value = document.get(key)
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def status_of(job: Job) -> Mapping[str, Any]:
    return part(job, "status")


def condition(job: Job, kind: str) -> Mapping[str, Any]:
    """The condition of this type, empty where it is missing."""
    return next((entry for entry in entries(status_of(job), "conditions") if entry.get("type") == kind), {})


def holds(job: Job, kind: str) -> bool:
    return condition(job, kind).get("status") == "True"


def name_of(job: Job) -> str:
    return str(part(job, "metadata").get("name", ""))


def suspend_asked(job: Job) -> bool:
    return part(job, "spec").get("suspend") is True


def ended(job: Job) -> JobEnded | None:
    """How the job ended; None while it goes on. `Succeeded` and `Failed` are for good, `Suspended` until somebody resumes it."""
    if holds(job, "Succeeded"):
        return JobEnded("Succeeded", ExitCode.DONE, str(condition(job, "Succeeded").get("message") or ""))
    if holds(job, "Failed"):
        found = condition(job, "Failed")
        words = ": ".join(str(found[key]) for key in ("reason", "message") if found.get(key))
        return JobEnded("Failed", failure_code(job), words or "the operator gave no reason")
    if suspend_asked(job) and holds(job, "Suspended"):
        return JobEnded("Suspended", ExitCode.YIELDED, str(condition(job, "Suspended").get("message") or ""))
    return None


def failure_code(job: Job) -> ExitCode:
    """The contract's code for a failed job: of the reason that ended it, else of its last failed process, else 70."""
    code = _CODES.get(str(condition(job, "Failed").get("reason")))
    if code is not None and code not in _NO_FAILURE:
        return code
    failures = entries(status_of(job), "failures")
    last = failures[0].get("exitCode") if failures else None
    if last in set(ExitCode) - _NO_FAILURE:
        return ExitCode(last)
    return ExitCode.INTERNAL


def seconds(text: Any) -> float | None:
    """Unix seconds of an RFC 3339 time; None when it is none."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def number(document: Mapping[str, Any], key: str) -> int | float | None:
    value = document.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
