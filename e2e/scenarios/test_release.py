"""The chart on a real cluster: an upgrade changes the operator and nothing of its jobs."""

from e2e.scenarios.release import NAMESPACE, Release
from e2e.scenarios.training import Tenant


def token_keys(release: Release) -> list[tuple[str, str]]:
    """Name and content of the Secret from which job tokens are derived."""
    secrets = release.cluster.get("secrets", "-n", NAMESPACE)["items"]
    return [
        (item["metadata"]["name"], item["data"]["token-key"]) for item in secrets if "token-key" in item.get("data", {})
    ]


def test_an_upgrade_keeps_the_token_key_the_jobs_and_their_pods(release: Release, tenant: Tenant) -> None:
    job = tenant.submit("upgraded", trainer={"testFreq": 0}, checkpoint={"saveFreq": 0})
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

    release.install()
    release.wait_ready()
    job.delete()
