"""The per-job token that guards every port of a job."""

import hmac
import os

from grpo_worker.environment import JOB_TOKEN


def job_token() -> str:
    """The token of this process's job ('' when it was started by hand without one: then no port is guarded)."""
    return os.environ.get(JOB_TOKEN, "")


def authorization(token: str) -> dict[str, str]:
    """Request headers that carry the token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def allowed(header: str, token: str) -> bool:
    return not token or hmac.compare_digest(header.encode(), f"Bearer {token}".encode())
