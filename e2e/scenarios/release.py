"""The Helm release under test, and what is done to its operator."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.errors import ClusterError
from e2e.cluster.host import wait_until
from e2e.scenarios.training import REPOSITORY, Cluster

CHART: Path = REPOSITORY / "charts" / "grpo-operator"
NAMESPACE = "grpo-system"
NAME = "grpo-operator"
SELECTOR = "app.kubernetes.io/name=grpo-operator"


@dataclass(frozen=True)
class Release:
    """`helm install` of the chart."""

    cluster: Cluster
    operator_image: str
    worker_image: str

    def install(self, *values: str) -> str:
        """Install or upgrade, and wait until the operator is ready."""
        return self.cluster.helm(
            "upgrade",
            "--install",
            NAME,
            str(CHART),
            "--namespace",
            NAMESPACE,
            "--create-namespace",
            "--wait",
            "--timeout=120s",
            *_image("image", self.operator_image),
            *_image("worker.image", self.worker_image),
            *(argument for value in values for argument in ("--set", value)),
        )

    def uninstall(self) -> str:
        """Nothing to do where the cluster itself was made anew meanwhile."""
        return self.cluster.helm(
            "uninstall", NAME, "--namespace", NAMESPACE, "--ignore-not-found", "--wait", "--timeout=120s"
        )

    def test(self) -> str:
        """`helm test`."""
        return self.cluster.helm("test", NAME, "--namespace", NAMESPACE, "--timeout=120s")

    def pods(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.cluster.get("pods", "-n", NAMESPACE, "-l", SELECTOR)["items"]
        return items

    def kill_operator(self) -> None:
        """End the operator's pod without grace; its Deployment makes another."""
        for pod in self.pods():
            self.cluster.kubectl(
                "delete", "pod", "-n", NAMESPACE, pod["metadata"]["name"], "--grace-period=0", "--force", "--wait=false"
            )

    def wait_ready(self) -> None:
        def ready() -> bool:
            try:
                return any(
                    status["ready"]
                    for pod in self.pods()
                    if "deletionTimestamp" not in pod["metadata"]
                    for status in pod["status"].get("containerStatuses", [])
                )
            except ClusterError:
                return False

        wait_until(ready, "the operator to be ready", timeout_seconds=120)


def _image(key: str, reference: str) -> list[str]:
    """Chart values of an image reference: registry/repository:tag."""
    name, _, tag = reference.rpartition(":")
    registry, _, repository = name.partition("/")
    return [
        "--set",
        f"{key}.registry={registry}",
        "--set",
        f"{key}.repository={repository}",
        "--set",
        f"{key}.tag={tag}",
    ]
