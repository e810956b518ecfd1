"""kubectl and helm against one kubeconfig, each call with a limit."""

import json
import uuid
from pathlib import Path
from typing import Any

from .host import run, wait_until

CALL_SECONDS = 60


class Client:
    """Calls the built kubectl and helm as the user of a kubeconfig."""

    makes_default_accounts = True  # a controller gives each namespace the service account that pods run as

    def __init__(self, binaries: Path, kubeconfig: Path) -> None:
        self.binaries = binaries
        self.kubeconfig = kubeconfig

    def kubectl(self, *arguments: str, input_text: str | None = None, timeout_seconds: float = CALL_SECONDS) -> str:
        """What kubectl printed; raises ClusterError with its words when it fails."""
        command = [self.binaries / "kubectl", "--kubeconfig", self.kubeconfig, *arguments]
        return run(command, input_text=input_text, timeout_seconds=timeout_seconds).stdout

    def helm(self, *arguments: str, timeout_seconds: float = 5 * CALL_SECONDS) -> str:
        """What helm printed; raises ClusterError with its words when it fails."""
        command = [self.binaries / "helm", "--kubeconfig", self.kubeconfig, *arguments]
        return run(command, timeout_seconds=timeout_seconds).stdout

    def wait_for_crd(self, name: str, timeout_seconds: float = 30) -> None:
        """Until the API server serves the kind. (`kubectl wait` fails on a definition that has no conditions yet.)"""

        def established() -> bool:
            conditions = self.get("crd", name).get("status", {}).get("conditions") or []
            return any(condition["type"] == "Established" and condition["status"] == "True" for condition in conditions)

        wait_until(established, f"crd/{name} to be established", timeout_seconds=timeout_seconds)

    def get(self, *arguments: str) -> Any:
        """`kubectl get ... -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, manifest: Path | str | dict[str, Any]) -> None:
        """Server-side apply of a file or folder (Path), of YAML text, or of one document (dict)."""
        arguments = ["apply", "--server-side", "--force-conflicts", "-f"]
        if isinstance(manifest, Path):
            self.kubectl(*arguments, str(manifest))
        else:
            text = manifest if isinstance(manifest, str) else json.dumps(manifest)
            self.kubectl(*arguments, "-", input_text=text)

    def create_namespace(self, prefix: str = "test") -> str:
        """A fresh namespace with a name of its own, ready for pods."""
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.kubectl("create", "namespace", name)
        if self.makes_default_accounts:
            self.kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=30s")
        return name

    def delete_namespace(self, name: str) -> None:
        """Ask for its end; the namespace controller does the rest."""
        self.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
