"""The node's container runtime: its configuration, the pause image, and what it still holds of pods.

The image store outlives the node (its folder carries containerd's version), so an image of gigabytes is pulled once; everything that
belongs to pods is removed with the node.
"""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

from .errors import ClusterError
from .host import cache_directory, run
from .recipe import MODULES

PAUSE_IMAGE = "localhost/pause:1"
NAMESPACE = "k8s.io"


def image_reference(name: str) -> str:
    """The name by which pods ask for an image of ours; containerd asks the node's registry for it."""
    return f"localhost/{name}:e2e"


def image_store() -> Path:
    """Where containerd keeps images from one node to the next."""
    version = re.search(r"containerd/containerd/v2 (v\S+)", (MODULES / "containerd" / "go.mod").read_text())
    if version is None:
        raise ClusterError(f"{MODULES}/containerd/go.mod does not name containerd's version.")
    return cache_directory() / f"containerd-{version[1]}"


def configuration(directory: Path, binaries: Path) -> str:
    """containerd's configuration file for a node whose data lies in `directory`."""
    images, runtime = 'plugins."io.containerd.cri.v1.images"', 'plugins."io.containerd.cri.v1.runtime"'
    return f"""\
version = 3
root = "{image_store()}"
state = "{directory}/containerd"
[grpc]
  address = "{directory}/containerd.sock"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[{images}]
  snapshotter = "overlayfs"
  [{images}.pinned_images]
    sandbox = "{PAUSE_IMAGE}"
  [{images}.registry]
    config_path = "{directory}/registries"
[{runtime}]
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [{runtime}.cni]
    bin_dirs = ["{binaries}"]
    conf_dir = "{directory}/cni"
  [{runtime}.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [{runtime}.containerd.runtimes.runc.options]
      Root = "{directory}/runc"
"""


class Ctr:
    """containerd's own client."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._command = [binaries / "ctr", "--address", directory / "containerd.sock", "--namespace", NAMESPACE]

    def run(self, *arguments: str | Path, timeout_seconds: float = 60) -> str:
        return run([*self._command, *arguments], timeout_seconds=timeout_seconds).stdout

    def answers(self) -> bool:
        return run([*self._command, "version"], check=False, timeout_seconds=10).returncode == 0

    def remove_pods(self) -> bool:
        """Remove tasks, containers and sandboxes; whether there were any. Their processes end with KILL."""
        tasks = self.run("tasks", "list", "--quiet").split()
        containers = self.run("containers", "list", "--quiet").split()
        sandboxes = [line.split()[0] for line in self.run("sandboxes", "list").splitlines()[1:] if line.split()]
        for task in tasks:
            run([*self._command, "tasks", "delete", "--force", task], check=False)
        for container in containers:
            run([*self._command, "containers", "delete", container], check=False)
        for sandbox in sandboxes:
            run([*self._command, "sandboxes", "remove", "--force", sandbox], check=False)
        return bool(tasks or containers or sandboxes)


def pause_archive(binaries: Path, target: Path) -> None:
    """An image archive (docker-archive) of one file: the pause program."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        information = tarfile.TarInfo("pause")
        content = (binaries / "pause").read_bytes()
        information.size, information.mode = len(content), 0o755
        tar.addfile(information, io.BytesIO(content))
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]
    parts = {
        "config.json": json.dumps(document).encode(),
        "layer.tar": layer.getvalue(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(target, "w") as tar:
        for name, data in parts.items():
            information = tarfile.TarInfo(name)
            information.size = len(data)
            tar.addfile(information, io.BytesIO(data))
