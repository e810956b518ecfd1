"""The first thing a person does: install the chart, apply the example, look."""

import time

import yaml
from e2e.scenarios.release import Release
from e2e.scenarios.training import EXAMPLE, Job, Tenant

RISE = 0.30


def test_the_chart_answers_its_own_test(release: Release) -> None:
    assert "Succeeded" in release.test()


def test_the_example_trains_and_its_checkpoint_answers(tenant: Tenant) -> None:
    started = time.monotonic()
    tenant.kubectl("apply", "-f", str(EXAMPLE))
    job = Job(tenant, yaml.safe_load(EXAMPLE.read_text())["metadata"]["name"])
    job.until(lambda status: len(job.pods()) == 3, "pods created", 60)
    print(f"apply to pods created: {time.monotonic() - started:.1f} s")
    job.until_step(1)
    print(f"apply to the first step: {time.monotonic() - started:.1f} s")
    job.until_state("Succeeded", 1200)
    print(f"apply to Succeeded: {time.monotonic() - started:.1f} s")

    accuracy = job.metric("val/accuracy/pass@1")
    assert accuracy[80] - accuracy[0] >= RISE, accuracy
    status = job.status()
    assert status["progress"]["step"] == status["progress"]["totalSteps"] == 80
    assert abs(status["progress"]["accuracy"] - accuracy[80]) < 1e-6
    assert status["restarts"] == 0 and not status["failures"]
    assert len(job.trained()) == len(set(job.trained()[:1280])) * 2 == 2560  # two epochs, each prompt once

    columns, row = (line.split() for line in tenant.kubectl("get", "grpojobs", job.name).splitlines())
    shown = dict(zip(columns, row, strict=True))
    assert shown["STATE"] == "Succeeded" and shown["STEP"] == "80" and shown["RESTARTS"] == "0", shown
    description = tenant.kubectl("describe", "grpojob", job.name)
    print(tenant.kubectl("get", "grpojobs", job.name), description[description.find("Status:") :], sep="\n")
    assert "Succeeded" in description and "Training begins" in description

    answer = tenant.shell(
        "grpo", "generate", "--checkpoint", f"runs/{job.name}", "--prompt", "482+359=", timeout_seconds=240
    )
    assert "####" in answer, answer
    # What has ended stays for its logs, and goes with the job; the files on the volume do not.
    assert set(job.pods()) == {f"{job.name}-coordinator", f"{job.name}-trainer-0", f"{job.name}-rollout-0"}
    job.delete()
    assert "epoch_2_step_80" in tenant.shell("ls", f"runs/{job.name}/checkpoints") or job.records("metrics.jsonl")
