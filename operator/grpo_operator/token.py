"""The token that guards the ports of one job.

Invariant: it follows from the operator's key and the job's UID alone, so the operator never has to read a Secret, a restarted operator
derives the same token, and a job made again under the same name has another.
"""

import base64
import hashlib
import hmac
from pathlib import Path

SHORTEST_KEY_BYTES = 16


class TokenKeyError(Exception):
    """The operator's key file is missing or too short."""


def read_key(path: Path) -> bytes:
    """Raises TokenKeyError."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise TokenKeyError(
            f"--token-key-file {path}: {error.strerror}. It holds the secret from which the tokens of jobs are derived: mount the chart's "
            f"Secret there, or make one with `head -c 32 /dev/urandom | base64 > {path}`."
        ) from error
    if len(key) < SHORTEST_KEY_BYTES:
        raise TokenKeyError(f"--token-key-file {path}: {len(key)} bytes; at least {SHORTEST_KEY_BYTES} are needed.")
    return key


def job_token(key: bytes, job_uid: str) -> str:
    """HMAC-SHA256 of the UID, in lower-case base32 without padding (52 characters)."""
    return base64.b32encode(hmac.new(key, job_uid.encode(), hashlib.sha256).digest()).decode().rstrip("=").lower()
