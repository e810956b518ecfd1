"""From a GRPOJob of the API to `facts.Job`.

Invariant: total: a document that is not valid becomes a job without spec, which says why; a status that somebody spoilt is read as far
as it is sound.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from grpo_operator import clock
from grpo_operator.facts import Job
from grpo_worker.config import RULES, InvalidJob, Spec, job_from_document
from grpo_worker.config.status import GRPOJobStatus
from grpo_worker.errors import GRPOError


def read_job(document: Mapping[str, Any]) -> Job:
    metadata = document.get("metadata") or {}
    spec: Spec | None = None
    invalid = ""
    try:
        # A job that has started was let in by the rules of its day, and its fields cannot be mended: newer rules do not stop it.
        rules = () if (document.get("status") or {}).get("startTime") else RULES
        spec = job_from_document(_own(document), metadata.get("name", "GRPOJob"), rules=rules).spec
    except InvalidJob as error:
        invalid = "; ".join(str(issue) for issue in error.issues)
    except GRPOError as error:  # for example a preset that does not exist
        invalid = str(error)
    return Job(
        name=metadata.get("name", ""),
        namespace=metadata.get("namespace") or "default",
        uid=metadata.get("uid", ""),
        generation=int(metadata.get("generation") or 0),
        created=clock.parse(metadata.get("creationTimestamp")) or datetime.fromtimestamp(0, UTC),
        spec=spec,
        status=_status(document.get("status") or {}),
        document=_own(document),
        invalid=invalid,
        deleting=bool(metadata.get("deletionTimestamp")),
    )


def _own(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the person wrote."""
    return {key: document[key] for key in ("apiVersion", "kind", "metadata", "spec") if key in document}


def _status(raw: Mapping[str, Any]) -> GRPOJobStatus:
    """Fields that do not fit the model are left out; they are written anew."""
    try:
        return GRPOJobStatus.model_validate(raw)
    except ValidationError as error:
        broken = {detail["loc"][0] for detail in error.errors() if detail["loc"]}
        try:
            return GRPOJobStatus.model_validate({key: value for key, value in raw.items() if key not in broken})
        except ValidationError:
            return GRPOJobStatus()
