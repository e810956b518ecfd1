"""A cluster that somebody else runs: its administrator's kubeconfig, and a registry that its nodes pull from."""

import os
from pathlib import Path
from typing import Self

from .build import build
from .client import Client
from .errors import ClusterError


class ExistingCluster(Client):
    """kubectl and helm against KUBECONFIG; images are named GRPO_E2E_IMAGE_PREFIX + name + `:e2e`."""

    def __init__(self, kubeconfig: Path, image_prefix: str) -> None:
        if not kubeconfig.is_file():
            raise ClusterError(f"KUBECONFIG={kubeconfig}: no such file.")
        super().__init__(build(("kubectl", "helm")), kubeconfig)
        self._image_prefix = image_prefix

    @classmethod
    def from_environment(cls) -> Self | None:
        """The cluster that both variables name; none of it when one is missing, so a kubeconfig in a shell is never used by accident."""
        kubeconfig, prefix = os.environ.get("KUBECONFIG"), os.environ.get("GRPO_E2E_IMAGE_PREFIX")
        return cls(Path(kubeconfig), prefix) if kubeconfig and prefix else None

    def image(self, name: str) -> str:
        """The name by which pods ask for an image."""
        return f"{self._image_prefix}{name}:e2e"
