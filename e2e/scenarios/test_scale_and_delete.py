"""Rollout pods come and go while a job trains; a job that is deleted leaves its files and nothing else."""

from e2e.cluster.host import wait_until
from e2e.scenarios.training import ENDLESS, Tenant


def test_rollouts_scale_up_and_down_while_training_goes_on(tenant: Tenant) -> None:
    """Weights go over groups of the pods that there are, made anew when one comes or goes."""
    network = {"weightSync": "nccl"}
    job = tenant.submit("scaled", trainer=ENDLESS, checkpoint={"saveFreq": 0}, network=network)
    job.until_step(2)
    steady = job.uids("coordinator") | job.uids("trainer") | job.uids("rollout")

    tenant.kubectl("scale", "grpojob", job.name, "--replicas=2")
    wait_until(lambda: job.ready("rollout") == 2, "two rollout pods in service", timeout_seconds=300)
    step = job.step()
    job.until_step(step + 2)
    assert steady < {pod["metadata"]["uid"] for pod in job.pods().values()}
    assert job.status()["rollout"]["replicas"] == 2 and job.status()["summary"]["rollouts"] == "2/2"

    tenant.kubectl("scale", "grpojob", job.name, "--replicas=1")
    wait_until(lambda: len(job.pods("rollout")) == 1, "one rollout pod", timeout_seconds=120)
    step = job.step()
    job.until_step(step + 2)
    assert steady == {pod["metadata"]["uid"] for pod in job.pods().values()}
    assert job.status()["restarts"] == 0 and job.status()["attempt"] == 0
    # An engine that leaves in the middle of a broadcast costs that version the group: nobody took it so, then.
    lines = [line for line in job.records("metrics.jsonl") if "weight_sync/engines" in line]
    synced = [(line["weight_sync/engines"], line.get("weight_sync/pull_seconds")) for line in lines]
    assert synced[-1] == (1, 0) and (2, 0) in synced, synced
    print(synced, [event for event in job.records("events.jsonl") if "Weight" in event["reason"]], sep="\n")

    assert len({line.partition("/")[0] for line in job.children()}) == 6
    job.delete()  # while it trains


def test_deletion_leaves_nothing_in_any_state(tenant: Tenant) -> None:
    pending = tenant.submit("pending", scheduling={"nodeSelector": {"grpo.dev/none": "such"}})
    pending.until(lambda status: len(pending.pods()) == 3, "pods that nobody can place", 60)
    starting = tenant.submit("starting")
    starting.until_state("Starting")
    suspended = tenant.submit("asleep", suspend=True)
    suspended.until_state("Suspended", 60)
    for job in (pending, starting, suspended):
        job.delete()


def test_a_finished_job_goes_when_its_time_is_over(tenant: Tenant) -> None:
    job = tenant.submit("brief", ttlSecondsAfterFinished=0, data={"promptKey": "question"})
    wait_until(
        lambda: "brief" not in tenant.kubectl("get", "grpojobs", "-o", "name"), "the job deleted", timeout_seconds=300
    )
    wait_until(lambda: not job.children(), "its children gone", timeout_seconds=60)
