"""The Secret with the token that guards every port of a job.

Invariant: its name is known to the kubelet through `secretKeyRef`; the operator only ever applies it and needs no right to read one.
"""

import base64
from typing import Any

from grpo_operator.build.metadata import object_meta
from grpo_operator.facts import Job
from grpo_operator.labels import token_secret_name

KEY = "token"


def token_secret(job: Job, token: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": object_meta(job, token_secret_name(job.name)),
        "type": "Opaque",
        "data": {KEY: base64.b64encode(token.encode()).decode()},
    }
