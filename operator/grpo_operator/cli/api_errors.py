"""What the API server's refusals mean to a person.

Invariant: pure. Each refusal becomes one message that says what was refused and what to do, with the exit code of its kind; the
server's own words are kept.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_worker.config.job import GROUP, KIND
from grpo_worker.errors import ConfigError, GRPOError, RetryableError, UsageError

CRD_NAME = f"grpojobs.{GROUP}"


class NotThere(UsageError):
    """The object that was asked for does not exist."""

    reason = "NotFound"


class Unreachable(RetryableError):
    """The API server gave no answer, or none that could be used; the same request may work later."""

    reason = "ApiServerUnreachable"


class Refused(ConfigError):
    """These credentials may not do this."""

    reason = "Forbidden"


@dataclass(frozen=True)
class Asked:
    """The request, in words: `verb` as RBAC names it, `what` for people."""

    verb: str
    what: str  # "GRPOJob arithmetic"
    namespace: str
    cluster: str  # "context dev"


def explain(code: int, body: bytes, asked: Asked) -> GRPOError:
    """The error for an answer with HTTP status `code`."""
    status = _status(body)
    words = str(status.get("message") or body.decode(errors="replace").strip() or f"HTTP {code}")
    if code == 401:
        return Refused(
            f"{asked.cluster}: the API server does not accept these credentials ({words}). Log in to the cluster again, "
            "or choose another --context."
        )
    if code == 403:
        return Refused(
            f"{asked.cluster}: not allowed to {asked.verb} {asked.what} in namespace {asked.namespace}. The API server says: "
            f"{words}. Ask for a role with that right, or choose another namespace with -n."
        )
    if code == 404:
        return _not_found(status, words, asked)
    if code == 409:
        return _conflict(status, words, asked)
    if code in (400, 422):
        return UsageError(f"{asked.what}: the API server refuses it.\n{_causes(status, words)}")
    if code == 429 or code >= 500:
        return Unreachable(f"{asked.cluster}: the API server cannot {asked.verb} {asked.what} now ({code}): {words}")
    return ConfigError(f"{asked.cluster}: {asked.verb} {asked.what}: {code}: {words}")


def _not_found(status: Mapping[str, Any], words: str, asked: Asked) -> GRPOError:
    details = status.get("details") or {}
    if details.get("kind") == "namespaces":
        return UsageError(f"{asked.cluster}: there is no namespace {asked.namespace}. Choose one with -n.")
    if asked.what.startswith(KIND) and not details.get("name"):
        return ConfigError(
            f"{asked.cluster}: this cluster does not know {KIND}s: the CustomResourceDefinition {CRD_NAME} is not installed. "
            "Who administers the cluster installs it with the operator (the CRD alone: grpo crd | kubectl apply --server-side -f -)."
        )
    return NotThere(f"{asked.cluster}: there is no {asked.what} in namespace {asked.namespace} ({words}).")


def _conflict(status: Mapping[str, Any], words: str, asked: Asked) -> GRPOError:
    causes = [cause for cause in _list(status) if cause.get("reason") == "FieldManagerConflict"]
    if not causes:
        return Unreachable(f"{asked.what}: it changed at the same moment ({words}). Try again.")
    lines = [f"  {str(cause.get('field', '')).removeprefix('.')}: {cause.get('message', '')}" for cause in causes]
    return UsageError(
        "\n".join([f"{asked.what}: somebody else set these fields to another value:", *lines])
        + "\nLeave them out of the file or give them the value they have, or take them over with --force-conflicts."
    )


def _causes(status: Mapping[str, Any], words: str) -> str:
    """One line a cause; the server's whole message when it names none."""
    lines = list(dict.fromkeys(f"  {_cause(cause)}" for cause in _list(status))) or [f"  {words}"]
    if "immutable" in words:
        lines.append("Undo the change, or submit it as another job: --set metadata.name=NAME")
    elif "unknown field" in words:
        lines.append("The cluster's CustomResourceDefinition is of another version than this grpo (see grpo crd).")
    return "\n".join(lines)


def _cause(cause: Mapping[str, Any]) -> str:
    """`field: what is wrong`, the field once."""
    field, message = str(cause.get("field") or ""), str(cause.get("message") or "").removeprefix("Invalid value: ")
    return message if not field or message.startswith(field) else f"{field}: {message}"


def _list(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    details = status.get("details") or {}
    return [cause for cause in details.get("causes") or () if isinstance(cause, Mapping)]


def _status(body: bytes) -> Mapping[str, Any]:
    """The `Status` object of an error answer; empty when it is something else (a proxy's page, `404 page not found`)."""
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, Mapping) and document.get("kind") == "Status" else {}
