"""`grpo submit`, `status`, `logs`, `stop` and `resume` against a real cluster, as a person types them."""

import os
import subprocess
import sys

from e2e.cluster.host import wait_until
from e2e.scenarios.training import EXAMPLE, Job, Tenant


def grpo(tenant: Tenant, *arguments: str, timeout_seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "grpo_worker.cli.main", *arguments, "-n", tenant.namespace],
        env={**os.environ, "KUBECONFIG": str(tenant.cluster.kubeconfig)},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


def test_a_job_is_submitted_looked_at_stopped_and_resumed(tenant: Tenant) -> None:
    job = Job(tenant, "typed")
    fields = (
        "metadata.name=typed",
        "trainer.totalSteps=8",
        "trainer.testFreq=0",
        "trainer.valBeforeTrain=false",
        "checkpoint.saveFreq=0",
    )
    sets = [word for field in fields for word in ("--set", field)]
    sent = grpo(tenant, "submit", str(EXAMPLE), *sets, "--no-follow")
    assert sent.returncode == 0, sent.stderr
    job.until_step(2)

    shown = grpo(tenant, "status", job.name)
    assert shown.returncode == 0 and "Training" in shown.stdout, shown
    listed = grpo(tenant, "status")
    assert job.name in listed.stdout, listed
    logs = grpo(tenant, "logs", job.name, "--role", "coordinator")
    assert "Rollout: generating 32 prompts x 8 samples = 256 trajectories" in logs.stdout, logs

    stopped = grpo(tenant, "stop", job.name, timeout_seconds=200)
    assert stopped.returncode == 0, stopped
    assert not job.pods()
    resumed = grpo(tenant, "resume", job.name)
    assert resumed.returncode == 0, resumed
    followed = grpo(tenant, "status", job.name, "--follow", timeout_seconds=400)
    assert followed.returncode == 0, followed
    assert "8" in followed.stdout
    wait_until(lambda: job.status().get("state") == "Succeeded", "success", timeout_seconds=30)
    assert len(job.trained()) == len(set(job.trained())) == 8 * 32
    job.delete()
