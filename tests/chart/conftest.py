"""What the chart's tests share: Helm, and a real kube-apiserver for those that ask one."""

from collections.abc import Iterator

import pytest
from chart_rendering import Chart
from e2e.cluster import ControlPlane
from e2e.cluster.build import build


@pytest.fixture(scope="session")
def chart() -> Chart:
    """The chart and the Helm that renders it; what the cache lacks is built first."""
    return Chart(build(["helm"]) / "helm")


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    with ControlPlane() as started:
        yield started


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace that admits only pods of the restricted Pod Security Standard."""
    name = control_plane.create_namespace()
    control_plane.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield name
    control_plane.delete_namespace(name)
