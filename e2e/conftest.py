"""The cluster that e2e tests run on: the project's own node, or one that exists.

Default: a node made on this machine for the session (root; the first time some minutes to build Kubernetes, then seconds). A node that
runs already (`python -m e2e.cluster up`) is used and left running. With KUBECONFIG and GRPO_E2E_IMAGE_PREFIX (for instance
`registry.example.com/team/`) set, an existing cluster is used, whose nodes pull `PREFIX` + name + `:e2e`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.cluster import node
from e2e.cluster.build import build
from e2e.cluster.existing import ExistingCluster
from e2e.cluster.images import base_image, build_project_image, load_image
from e2e.cluster.node import Node

_parts: list[tuple[str, float]] = []  # what the session spent on its cluster, in seconds


@contextmanager
def _timed(part: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    _parts.append((part, time.monotonic() - started))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's limit counts its own time: the cluster and the images that its fixtures make first have limits of their own."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600, func_only=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long each part of the cluster took."""
    if _parts:
        terminalreporter.write_sep("=", "cluster")
        for part, seconds in _parts:
            terminalreporter.write_line(f"{seconds:7.1f}s {part}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Node | ExistingCluster]:
    """kubectl(), helm(), apply(), get(), kubeconfig; image(name); on the project's own node also set_gpus(), create_volume(), log()."""
    existing = ExistingCluster.from_environment()
    if existing is not None:
        yield existing
        return
    with _timed("binaries built or found"):
        build()
    found = node.running()
    with _timed("node found running" if found else "node started"):
        started = found or node.up()
    yield started
    if found is None:
        with _timed("node ended"):
            node.down()


@pytest.fixture(scope="session")
def own_node(cluster: Node | ExistingCluster) -> Node:
    """The project's own node, for tests that fake GPUs, build images or look at the machine."""
    if not isinstance(cluster, Node):
        pytest.skip("needs the project's own node (KUBECONFIG and GRPO_E2E_IMAGE_PREFIX name another cluster)")
    return cluster


@pytest.fixture(scope="session")
def operator_image(cluster: Node | ExistingCluster) -> str:
    """The operator's image, built from this tree and loaded."""
    return _image(cluster, "grpo-operator")


@pytest.fixture(scope="session")
def worker_image(cluster: Node | ExistingCluster) -> str:
    """The worker's image for CPU, built from this tree and loaded."""
    return _image(cluster, "grpo-worker")


def _image(cluster: Node | ExistingCluster, name: str) -> str:
    if isinstance(cluster, Node):
        with _timed("base image made or found"):
            base_image()
        with _timed(f"{name} built"):
            build_project_image(name)
        with _timed(f"{name} loaded"):
            load_image(cluster, name)
    return cluster.image(name)


@pytest.fixture
def namespace(cluster: Node | ExistingCluster) -> Iterator[str]:
    """A fresh namespace; its end is asked for, not waited for."""
    name = cluster.create_namespace("e2e")
    yield name
    cluster.delete_namespace(name)
