"""Kills a container from outside, as the kernel would: what no process in a pod can do to its own first process."""

import os
import signal
from pathlib import Path
from typing import Any

from e2e.cluster.errors import ClusterError


def kill_container(pod: dict[str, Any], number: signal.Signals = signal.SIGKILL) -> None:
    """Signal the first process of the pod's worker container. Only on the project's own node, whose processes are this machine's."""
    (status,) = (item for item in pod["status"]["containerStatuses"] if item["name"] == "worker")
    identity = status["containerID"].rpartition("/")[2]
    found = []
    for cgroup in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            text = cgroup.read_text()
            namespaces = (cgroup.parent / "status").read_text()
        except OSError:
            continue  # it ended meanwhile
        ids = next(line.split()[1:] for line in namespaces.splitlines() if line.startswith("NSpid:"))
        if identity in text and ids[-1] == "1":
            found.append(int(cgroup.parent.name))
    if len(found) != 1:
        raise ClusterError(
            f"{pod['metadata']['name']}: expected one first process of container {identity}, found {found}"
        )
    os.kill(found[0], number)
