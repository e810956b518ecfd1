"""Kubeconfig files that carry all they need: they can be copied, mounted and handed to any client."""

import base64
from pathlib import Path
from typing import Any

from .host import write_json


def write_kubeconfig(
    path: Path,
    server: str,
    authority: Path,
    *,
    certificate: tuple[Path, Path] | None = None,
    token: str | None = None,
    namespace: str = "default",
) -> Path:
    """Write a kubeconfig for one user, known by a client certificate or a token."""
    user: dict[str, Any] = {}
    if certificate is not None:
        user = {"client-certificate-data": _encoded(certificate[0]), "client-key-data": _encoded(certificate[1])}
    if token is not None:
        user = {"token": token}
    cluster = {"server": server, "certificate-authority-data": _encoded(authority)}
    return write_json(
        path,
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "grpo-e2e", "cluster": cluster}],
            "users": [{"name": "user", "user": user}],
            "contexts": [
                {"name": "grpo-e2e", "context": {"cluster": "grpo-e2e", "user": "user", "namespace": namespace}}
            ],
            "current-context": "grpo-e2e",
        },
    )


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
