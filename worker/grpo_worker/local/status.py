"""What a process of a run says of itself, asked from the same machine or the same cluster.

Invariant: never raises and never waits for long: a process that is starting, or ended in the middle of its answer, has no word.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grpo_worker.protocol.auth import authorization

ANSWER_SECONDS = 2.0


def ask(url: str, headers: Mapping[str, str] = MappingProxyType({})) -> bytes | None:
    """The body of its answer, or None."""
    request = urllib.request.Request(url, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            body: bytes = response.read()
            return body
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return None


def ask_status(url: str, token: str) -> dict[str, Any] | None:
    """`/status` of the coordinator at `url`, or None."""
    body = ask(f"{url}/status", authorization(token))
    try:
        status: dict[str, Any] | None = None if body is None else json.loads(body)
    except ValueError:
        return None
    return status
