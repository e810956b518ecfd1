"""`grpo submit`, `status`, `logs`, `stop` and `resume` against a real cluster, as a person types them."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def fields(**values: object) -> list[str]:
    """`--set` for each field of the trainer, and a name; no validation, no checkpoints on the way."""
    common = {"trainer.testFreq": 0, "trainer.valBeforeTrain": "false", "checkpoint.saveFreq": 0}
    return [word for name, value in (common | values).items() for word in ("--set", f"{name}={value}")]


@contextmanager
def watched(tenant: Tenant, job: Job) -> Iterator[Callable[[], int]]:
    """`grpo watch JOB`: asks its page for the newest step."""
    command = [sys.executable, "-m", "grpo_worker.cli.main", "watch", job.name, "-n", tenant.namespace]
    environment = {**os.environ, "KUBECONFIG": str(tenant.cluster.kubeconfig), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)

        def newest_step() -> int:
            assert address, f"{line!r}, exit code {process.poll()}"
            with urllib.request.urlopen(address[0], timeout=60) as answer:
                page = answer.read().decode()
            assert '<meta http-equiv="refresh"' in page and job.name in page
            found = re.search(r"(\d+) steps", page)
            assert found, page[:3000]
            return int(found[1])

        try:
            yield newest_step
        finally:
            process.terminate()


def test_a_job_is_submitted_looked_at_stopped_and_resumed(tenant: Tenant) -> None:
    job = Job(tenant, "typed")
    endless = fields(**{"metadata.name": job.name, "trainer.totalSteps": 100_000})
    sent = grpo(tenant, "submit", str(EXAMPLE), *endless, "--no-follow")
    assert sent.returncode == 0, sent.stderr
    job.until_step(2)

    shown = grpo(tenant, "status", job.name)
    assert shown.returncode == 0 and "Training" in shown.stdout, shown
    listed = grpo(tenant, "status")
    assert job.name in listed.stdout, listed
    logs = grpo(tenant, "logs", job.name, "--role", "coordinator")
    assert "Rollout: generating 32 prompts x 8 samples = 256 trajectories" in logs.stdout, logs
    assert not re.search(r'^\{"time"', logs.stdout, re.MULTILINE), "lines to read"
    ours = [
        json.loads(line)
        for line in tenant.kubectl("logs", f"{job.name}-coordinator").splitlines()
        if line.startswith("{")
    ]
    assert {(line["job"], line["namespace"], line["role"], line["attempt"]) for line in ours} == {
        (job.name, tenant.namespace, "coordinator", 0)
    }
    assert any(line["message"].startswith("step 1/") and line["step"] == 1 for line in ours)

    with watched(tenant, job) as newest_step:
        seen = newest_step()
        job.until_step(seen + 2)
        wait_until(lambda: newest_step() > seen, "the page to follow", timeout_seconds=30)

    stopped = grpo(tenant, "stop", job.name, timeout_seconds=200)
    assert stopped.returncode == 0, stopped
    assert not job.pods()
    saved = job.status()["checkpoints"]["lastStep"]
    resumed = grpo(tenant, "resume", job.name)
    assert resumed.returncode == 0, resumed
    job.until_step(saved + 2)
    assert [record["step"] for record in job.records("ledger.jsonl")][: saved + 2] == list(range(1, saved + 3))
    trained = job.trained()
    assert len(trained) == len(set(trained))
    job.delete()


def test_submit_follows_a_job_to_its_end(tenant: Tenant) -> None:
    job = Job(tenant, "followed")
    short = fields(**{"metadata.name": job.name, "trainer.totalSteps": 2})
    sent = grpo(tenant, "submit", str(EXAMPLE), *short, timeout_seconds=400)
    assert sent.returncode == 0, sent
    assert "step 2/2" in sent.stdout and "succeeded" in sent.stdout, sent.stdout
    assert job.status()["state"] == "Succeeded"
    looked = grpo(tenant, "status", job.name, "--follow")
    assert looked.returncode == 0 and "succeeded" in looked.stdout, looked
    job.delete()
