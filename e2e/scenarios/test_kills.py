"""Pods, containers, the coordinator and the operator are killed while a job trains; nothing is lost, nothing is done twice."""

from e2e.cluster.host import wait_until
from e2e.cluster.node import Node
from e2e.scenarios.containers import kill_container
from e2e.scenarios.release import Release
from e2e.scenarios.training import ENDLESS, Job, Tenant

EPOCH_PROMPTS = 40 * 32


def restarts(job: Job) -> dict[str, int]:
    return {role["name"]: role["restarts"] for role in job.status()["roles"]}


def test_a_job_survives_the_loss_of_any_part_of_it(tenant: Tenant, release: Release, own_node: Node) -> None:
    job = tenant.submit("kills", rollout={"replicas": 2}, trainer=ENDLESS, checkpoint={"saveFreq": 5})
    job.until_step(6)
    job.until_all_ready()

    # A rollout pod: training goes on; its successor is ready only once it serves current weights.
    before = {name: pod["metadata"]["uid"] for name, pod in job.pods().items()}
    step = job.step()
    tenant.kubectl("delete", "pod", f"{job.name}-rollout-1", "--grace-period=1")
    release.kill_operator()
    job.until_step(step + 2)
    wait_until(lambda: job.ready("rollout") == 2, "the new rollout pod in service", timeout_seconds=300)
    after = {name: pod["metadata"]["uid"] for name, pod in job.pods().items()}
    assert {name for name in before if before[name] != after[name]} == {f"{job.name}-rollout-1"}
    assert job.status()["attempt"] == 0 and job.status()["restarts"] == 0

    # The trainer's container, -9: the set starts again from the last checkpoint, engines stay.
    release.wait_ready()
    engines = job.uids("rollout")
    kill_container(job.pods("trainer")[f"{job.name}-trainer-0"])
    release.kill_operator()
    job.until(lambda status: status["attempt"] == 1, "a second attempt")
    saved = job.status()["checkpoints"]["lastStep"]
    assert saved >= 5
    job.until_step(job.step() + 2)
    assert job.uids("rollout") == engines
    assert job.status()["restarts"] == 1 and restarts(job)["trainer"] == 1
    failure = job.status()["failures"][0]
    assert failure["role"] == "trainer" and failure["exitCode"] == 137 and failure["action"] == "RestartSet", failure

    # The coordinator, -9.
    release.wait_ready()
    kill_container(job.pods("coordinator")[f"{job.name}-coordinator"])
    release.kill_operator()
    job.until(lambda status: status["attempt"] == 2, "a third attempt")
    job.until_step(job.step() + 1)
    assert job.uids("rollout") == engines
    assert job.status()["restarts"] == 2

    job.patch({"suspend": True})
    job.until_state("Suspended", 300)
    trained = job.trained()
    for first in range(0, len(trained), EPOCH_PROMPTS):  # each prompt once an epoch
        epoch = trained[first : first + EPOCH_PROMPTS]
        assert len(epoch) == len(set(epoch))
    steps = [record["step"] for record in job.records("ledger.jsonl")]
    assert steps == list(range(1, job.status()["checkpoints"]["lastStep"] + 1))
    counts = restarts(job)
    assert (counts["coordinator"], counts["trainer"]) == (2, 2)
    assert (
        counts["rollout"] <= 1
    )  # a pod that vanished while no operator looked is made again, and no failure of anybody
    print(tenant.kubectl("get", "grpojob", job.name))
    job.delete()
