"""What tests against a real API server share: documents short enough to read in a test."""

from typing import Any


def config_map(namespace: str, name: str, **data: str) -> dict[str, Any]:
    """The simplest object there is."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace},
        "data": data,
    }
