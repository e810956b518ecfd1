"""What the cluster is built from: each binary, the Go module that pins it, and one hash over all of that.

A binary is cached under the hash of this recipe, so a cache can hold old and new versions side by side and is never stale.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

MODULES = Path(__file__).parent / "modules"
KUBERNETES_VERSION = "v1.36.3"


def _kubernetes_stamp(version: str) -> str:
    """Linker flags that tell the Kubernetes binaries their version; without them Helm refuses a chart's kubeVersion."""
    major, minor, _ = version.removeprefix("v").split(".")
    return " ".join(
        f"-X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        f" -X {package}.gitTreeState=clean"
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    )


@dataclass(frozen=True)
class Binary:
    """One program: `package` built in the folder of its module (go.mod and go.sum pin everything it is made of)."""

    name: str
    module: str
    package: str
    linker_flags: str = ""


BINARIES = (
    *(
        Binary(name, "kube", f"k8s.io/kubernetes/cmd/{name}", _kubernetes_stamp(KUBERNETES_VERSION))
        for name in (
            "kube-apiserver",
            "kube-controller-manager",
            "kubectl",
            "kube-scheduler",
            "kubelet",
            "kube-proxy",
        )
    ),
    Binary("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
    Binary("coredns", "coredns", "github.com/coredns/coredns"),
    *(
        Binary(name, "containerd", f"github.com/containerd/containerd/v2/cmd/{name}")
        for name in ("containerd", "containerd-shim-runc-v2", "ctr")
    ),
    *(
        Binary(path.rpartition("/")[2], "cni", f"github.com/containernetworking/plugins/plugins/{path}")
        for path in ("main/bridge", "main/loopback", "ipam/host-local", "meta/portmap")
    ),
    Binary("pause", "pause", "."),
    Binary("registry", "registry", "github.com/distribution/distribution/v3/cmd/registry"),
    Binary("helm", "helm", "helm.sh/helm/v3/cmd/helm"),
    Binary("kwok", "kwok", "sigs.k8s.io/kwok/cmd/kwok"),
    Binary("kubeconform", "kubeconform", "github.com/yannh/kubeconform/cmd/kubeconform"),
)

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")


def recipe_hash() -> str:
    """16 hexadecimal digits over everything that decides what the binaries are."""
    digest = hashlib.sha256(repr(BINARIES).encode())
    for path in sorted(path for path in MODULES.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(MODULES)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
