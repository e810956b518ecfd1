"""A job that was suspended and resumed ends as one that was not."""

import time

from e2e.cluster.host import wait_until
from e2e.scenarios.training import Job, Tenant

STEPS = 40  # an epoch
GRACE_SECONDS = 120


def shape(tenant: Tenant, name: str) -> Job:
    return tenant.submit(
        name,
        trainer={"totalSteps": STEPS, "testFreq": 0},
        checkpoint={"saveFreq": 0},
        runtime={"terminationGracePeriodSeconds": GRACE_SECONDS},
    )


def weights(tenant: Tenant, job: Job) -> str:
    """Checksum of the final model."""
    path = tenant.shell(
        "sh", "-c", f"cat runs/{job.name}/checkpoints/*_step_{STEPS}/actor/model.safetensors | sha256sum"
    )
    return path.split()[0]


def test_suspend_frees_all_pods_and_resume_goes_on_bit_for_bit(tenant: Tenant) -> None:
    job = shape(tenant, "paused")
    job.until_step(5)
    asked = time.monotonic()
    job.patch({"suspend": True})
    wait_until(lambda: not job.pods(), "all pods gone", timeout_seconds=GRACE_SECONDS)
    print(f"suspend to no pods: {time.monotonic() - asked:.1f} s")
    job.until_state("Suspended", 30)
    status = job.status()
    step = status["checkpoints"]["lastStep"]
    assert 5 <= step < STEPS
    assert job.condition("Suspended")["status"] == "True"

    job.patch({"suspend": False})
    job.until_state("Succeeded", 600)
    assert job.status()["restarts"] == 0
    trained = job.trained()
    assert len(trained) == len(set(trained)) == STEPS * 32

    twin = shape(tenant, "steady")
    twin.until_state("Succeeded", 600)
    assert twin.trained() == trained
    for name in ("critic/score/mean", "actor/grad_norm", "actor/pg_loss"):
        assert job.metric(name) == twin.metric(name), name
    assert weights(tenant, job) == weights(tenant, twin)
    job.delete()
    twin.delete()


def test_a_job_that_is_born_suspended_makes_no_pod_until_it_is_resumed(tenant: Tenant) -> None:
    job = tenant.submit("born-suspended", suspend=True)
    job.until_state("Suspended", 60)
    assert not job.pods()
    job.delete()
