"""The chart installed by Helm, and a tenant whose workspace holds the demo's model and data."""

from collections.abc import Callable, Iterator

import pytest
from e2e.scenarios.release import Release
from e2e.scenarios.training import Cluster, Tenant


@pytest.fixture(scope="session")
def release(cluster: Cluster, operator_image: str, worker_image: str) -> Iterator[Release]:
    """The operator, from the chart and the images of this tree."""
    installed = Release(cluster, operator_image, worker_image)
    installed.install()
    yield installed
    installed.uninstall()


@pytest.fixture(scope="session")
def make_tenant(cluster: Cluster, release: Release) -> Iterator[Callable[[], Tenant]]:
    """Makes namespaces with a prepared workspace; they go with the session."""
    made: list[Tenant] = []

    def make() -> Tenant:
        tenant = Tenant(cluster, cluster.create_namespace("e2e"), release.worker_image)
        made.append(tenant)
        tenant.prepare()
        return tenant

    yield make
    for tenant in made:
        cluster.delete_namespace(tenant.namespace)


@pytest.fixture(scope="session")
def tenant(make_tenant: Callable[[], Tenant]) -> Tenant:
    """The namespace that most scenarios share; each has jobs of its own names."""
    return make_tenant()
