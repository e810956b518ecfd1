"""Images for the node: a Dockerfile built by buildah, pushed layer by layer to a registry on loopback, pulled by containerd.

Layers that did not change travel nowhere, so a change of code costs seconds also in an image of gigabytes. Pods name an image
`localhost/NAME:e2e`; the node's containerd knows that `localhost` is this registry.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from .build import say
from .containerd import image_reference
from .errors import ClusterError
from .host import cache_directory, need, run
from .node import Node

BUILD_SECONDS = 3600
TRANSFER_SECONDS = 1200

# The stand-in for docker.io/library/python:3.11-slim-bookworm, which a machine without Docker Hub cannot pull. As there, `python` and
# `pip` work, and pip installs for the whole image.
_SUITE = "bookworm"
_PACKAGES = ("ca-certificates", "python-is-python3", "python3", "python3-pip", "python3-venv")
_CUSTOMIZE = 'rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED'
CERTIFICATES = Path("/etc/ssl/certs")

REPOSITORY = Path(__file__).parents[2]
# The project's own images: Dockerfile and build arguments.
PROJECT_IMAGES: dict[str, tuple[str, dict[str, str]]] = {
    "grpo-operator": ("Dockerfile.operator", {}),
    "grpo-worker": ("Dockerfile.worker", {"DEVICE": "cpu"}),
}


def base_image() -> str:
    """The stand-in of the Python base image, made when the cache lacks it (about 70 s); its name for a build argument."""
    need("buildah", "mmdebstrap", "newuidmap")
    digest = hashlib.sha256(repr((_SUITE, _PACKAGES, _CUSTOMIZE)).encode()).hexdigest()[:16]
    name = f"localhost/grpo-e2e-python:{digest}"
    if run(["buildah", "inspect", "--type=image", name], check=False).returncode == 0:
        return name
    started = time.monotonic()
    archive = cache_directory() / f"base-{digest}.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        partial = archive.with_suffix(f".{os.getpid()}.tar")
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(_PACKAGES)}"]
        run([*command, f"--customize-hook={_CUSTOMIZE}", _SUITE, partial], timeout_seconds=600)
        partial.rename(archive)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "Dockerfile").write_text('FROM scratch\nADD base.tar /\nCMD ["python3"]\n')
        try:
            os.link(archive, Path(scratch) / "base.tar")
        except OSError:
            shutil.copyfile(archive, Path(scratch) / "base.tar")
        run(["buildah", "bud", "--quiet", "--isolation=chroot", "--tag", name, scratch], timeout_seconds=300)
    say(f"Base image in {time.monotonic() - started:.1f} s.")
    return name


def build_image(dockerfile: Path, name: str, context: Path, build_arguments: Mapping[str, str] | None = None) -> str:
    """Build a Dockerfile to `localhost/NAME:e2e`. Its RUN lines use this machine's network and certificate authorities."""
    need("buildah", "newuidmap")
    started = time.monotonic()
    command: list[str | Path] = ["buildah", "bud", "--quiet", "--layers", "--isolation=chroot", "--network=host"]
    command += [
        "--pull=false",
        f"--volume={CERTIFICATES}:{CERTIFICATES}:ro",
        "--tag",
        image_reference(name),
        "--file",
        dockerfile,
    ]
    for key, value in (build_arguments or {}).items():
        command += ["--build-arg", f"{key}={value}"]
    run([*command, context], timeout_seconds=BUILD_SECONDS)
    say(f"Built {image_reference(name)} in {time.monotonic() - started:.1f} s.")
    return image_reference(name)


def build_project_image(name: str) -> str:
    """Build one of the project's images from this tree, on the stand-in of the base image."""
    dockerfile, build_arguments = PROJECT_IMAGES[name]
    return build_image(REPOSITORY / dockerfile, name, REPOSITORY, {"BASE_IMAGE": base_image(), **build_arguments})


def load_image(node: Node, name: str) -> str:
    """Bring a built image to the node; only layers it lacks are moved."""
    started = time.monotonic()
    target = f"docker://127.0.0.1:{node.registry_port}/{image_reference(name).partition('/')[2]}"
    push: list[str | Path] = ["buildah", "push", "--quiet", "--tls-verify=false", "--format=oci"]
    # zstd at its fastest: gzip would take a core minutes for an image of gigabytes.
    push += ["--compression-format=zstd", "--compression-level=1", image_reference(name), target]
    try:
        run(push, timeout_seconds=TRANSFER_SECONDS)
    except ClusterError as error:
        raise ClusterError(f"{error}\n{node.log('registry')}") from error
    pushed = time.monotonic()
    pull: list[str | Path] = ["images", "pull", "--hosts-dir", node.directory / "registries", image_reference(name)]
    node.ctr.run(*pull, timeout_seconds=TRANSFER_SECONDS)
    say(f"Loaded {image_reference(name)}: push {pushed - started:.1f} s, pull {time.monotonic() - pushed:.1f} s.")
    return image_reference(name)
