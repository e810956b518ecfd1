"""A real kube-apiserver for the tests of this folder: one a session, a namespace a test."""

from collections.abc import Iterator

import pytest
from e2e.cluster import ControlPlane


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """etcd, kube-apiserver and the controllers that keep objects consistent."""
    with ControlPlane() as started:
        yield started


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace; its end is asked for, not waited for."""
    name = control_plane.create_namespace()
    yield name
    control_plane.delete_namespace(name)
