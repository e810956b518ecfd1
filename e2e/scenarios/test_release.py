"""The chart on a real cluster: upgrade, uninstall and install change the operator and nothing of its jobs."""

from e2e.cluster.host import wait_until
from e2e.scenarios.release import NAMESPACE, Release
from e2e.scenarios.training import ENDLESS, Tenant


def token_keys(release: Release) -> list[tuple[str, str]]:
    """Name and content of the Secret from which job tokens are derived."""
    secrets = release.cluster.get("secrets", "-n", NAMESPACE)["items"]
    return [
        (item["metadata"]["name"], item["data"]["token-key"]) for item in secrets if "token-key" in item.get("data", {})
    ]


def test_a_job_trains_on_while_its_operator_is_upgraded_removed_and_installed_again(
    release: Release, tenant: Tenant
) -> None:
    job = tenant.submit("upgraded", trainer=ENDLESS, checkpoint={"saveFreq": 0})
    job.until_step(1)
    before, pods, operator = token_keys(release), job.pods(), release.pods()
    assert len(before) == 1

    release.install("operator.logFormat=json", "operator.workers=4")
    release.wait_ready()
    assert token_keys(release) == before
    assert {pod["metadata"]["uid"] for pod in operator}.isdisjoint(pod["metadata"]["uid"] for pod in release.pods())
    step = job.step()
    job.until_step(step + 2)
    assert {pod["metadata"]["uid"] for pod in job.pods().values()} == {pod["metadata"]["uid"] for pod in pods.values()}

    release.uninstall()
    wait_until(lambda: not release.pods(), "the operator to be gone", timeout_seconds=90)
    assert token_keys(release) == before  # kept, as the CRD and with it the jobs are
    release.install()
    release.wait_ready()
    step = job.step()
    job.until_step(step + 2)
    assert {pod["metadata"]["uid"] for pod in job.pods().values()} == {pod["metadata"]["uid"] for pod in pods.values()}
    assert job.status()["restarts"] == 0 and job.status()["attempt"] == 0
    job.delete()
