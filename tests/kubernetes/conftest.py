"""A real kube-apiserver for the tests of this folder: one a session, a namespace a test."""

from collections.abc import Iterator

import pytest
from e2e.cluster import ControlPlane
from e2e.cluster.build import build
from e2e.cluster.recipe import CONTROL_PLANE


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the cache lacks before the first test: on a new machine that takes longer than a test may."""
    asked = any("control_plane" in getattr(item, "fixturenames", ()) for item in session.items)
    if asked and not session.config.getoption("collectonly"):
        build(CONTROL_PLANE)


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """etcd, kube-apiserver and the controllers that keep objects consistent; what the cache lacks of them is built first."""
    with ControlPlane() as started:
        yield started


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace; its end is asked for, not waited for."""
    name = control_plane.create_namespace()
    yield name
    control_plane.delete_namespace(name)
