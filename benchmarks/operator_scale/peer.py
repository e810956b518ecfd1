"""Kubeflow's training-operator, built from its Go module (Apache-2.0), whose version and hashes `training_operator/go.mod` and go.sum pin.

Invariant: its code and its CRDs stay in Go's module cache; the binary appears in this project's cache whole or not at all.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from e2e.cluster.host import cache_directory, need, run

MODULE_FOLDER = Path(__file__).parent / "training_operator"
MODULE = "github.com/kubeflow/training-operator"
PACKAGE = f"{MODULE}/cmd/training-operator.v1"
WEBHOOK_SECRET = "training-operator-webhook-cert"
# Where it looks for the mounted Secret; it has no flag for that.
CERTIFICATES = Path("/tmp/k8s-webhook-server/serving-certs")
BUILD_SECONDS = 1800

_ENVIRONMENT = {"CGO_ENABLED": "0", "GOFLAGS": "-trimpath -buildvcs=false", "GOWORK": "off"}


def version() -> str:
    return _go("list", "-m", "-f", "{{.Version}}", MODULE)


def source() -> Path:
    """Its module in Go's cache, downloaded when it is not there yet."""
    _go("mod", "download", MODULE)
    return Path(_go("list", "-m", "-f", "{{.Dir}}", MODULE))


def build() -> Path:
    """The binary, built when the cache lacks it (a minute or more)."""
    digest = hashlib.sha256(b"".join((MODULE_FOLDER / name).read_bytes() for name in ("go.mod", "go.sum")))
    target = cache_directory() / f"training-operator-{digest.hexdigest()[:16]}"
    if not target.exists():
        print("Building the training-operator from its Go module ...", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
            _go("build", "-ldflags", "-s -w", "-o", str(Path(scratch) / "binary"), PACKAGE)
            (Path(scratch) / "binary").rename(target)
    return target


def mount(certificate: Path, key: Path) -> None:
    """Play the kubelet that mounts its Secret."""
    CERTIFICATES.mkdir(parents=True, exist_ok=True)
    shutil.copy(certificate, CERTIFICATES / "tls.crt")
    shutil.copy(key, CERTIFICATES / "tls.key")


def unmount() -> None:
    shutil.rmtree(CERTIFICATES.parent, ignore_errors=True)


def _go(*arguments: str) -> str:
    need("go")
    environment = os.environ | _ENVIRONMENT
    return run(
        ["go", *arguments], directory=MODULE_FOLDER, environment=environment, timeout_seconds=BUILD_SECONDS
    ).stdout.strip()
