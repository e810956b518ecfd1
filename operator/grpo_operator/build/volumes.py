"""Volumes of a pod, and where the worker finds them.

Invariant: the root file system is read-only; what a process writes goes to the workspace, which all pods share and which outlives them,
or to a volume of the pod's own. /etc/grpo holds the document.
"""

from typing import Any

from grpo_operator.build.config import DIRECTORY, config_map_name
from grpo_operator.build.errors import CannotBuild, spec_of
from grpo_operator.facts import Job

WORKSPACE = "/workspace"
HOME = "/home/grpo"
TEMPORARY = "/tmp"
SHARED_MEMORY = "/dev/shm"


def volumes(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes of the pod, mounts of the worker container). Raises CannotBuild."""
    runtime = spec_of(job).runtime
    if runtime.workspace is None:
        raise CannotBuild(
            "runtime.workspace: a job on a cluster needs a volume that its pods share, for checkpoints and the run's files. "
            "Set runtime.workspace.claimName to a PersistentVolumeClaim (ReadWriteMany, unless all pods run on one node)."
        )
    ours = [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": runtime.workspace.claim_name}},
        {"name": "config", "configMap": {"name": config_map_name(job)}},
        {"name": "home", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": runtime.shm_size}},
    ]
    mounts = [
        _mount("workspace", WORKSPACE, sub_path=runtime.workspace.sub_path),
        _mount("config", DIRECTORY, read_only=True),
        _mount("home", HOME),
        _mount("tmp", TEMPORARY),
        _mount("shm", SHARED_MEMORY),
    ]
    for extra in runtime.volumes:  # no name and no path twice: the document was refused
        ours.append({"name": extra.name, "persistentVolumeClaim": {"claimName": extra.claim_name}})
        mounts.append(_mount(extra.name, extra.mount_path, sub_path=extra.sub_path, read_only=extra.read_only))
    return ours, mounts


def _mount(name: str, path: str, *, sub_path: str | None = None, read_only: bool = False) -> dict[str, Any]:
    mount: dict[str, Any] = {"name": name, "mountPath": path}
    if sub_path:
        mount["subPath"] = sub_path
    if read_only:
        mount["readOnly"] = True
    return mount
