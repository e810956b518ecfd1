"""A coordinator's word on its run, asked from the same machine or the same cluster.

Invariant: never raises and never waits for long: a coordinator that is starting, or ended in the middle of its answer, has no word.
"""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from grpo_worker.protocol.auth import authorization

STATUS_TIMEOUT_SECONDS = 2.0


def ask_status(url: str, token: str) -> dict[str, Any] | None:
    """`/status` of the coordinator at `url`, or None."""
    request = urllib.request.Request(f"{url}/status", headers=authorization(token))
    try:
        with urllib.request.urlopen(request, timeout=STATUS_TIMEOUT_SECONDS) as response:
            status: dict[str, Any] = json.load(response)
            return status
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return None
