"""`grpo status` in words."""

from typing import Any

import pytest
from cli_jobs import NOW, TRAINING, job, new_job, suspended, with_condition

from grpo_operator.cli.text import age, next_steps, snapshot, table, wrong


def say(command: str) -> str:
    return f"grpo {command}"


def test_the_snapshot_tells_state_progress_pods_failures_and_what_is_wrong() -> None:
    assert snapshot(TRAINING, NOW, say).splitlines() == [
        "arithmetic  Training  (namespace ml)",
        "Step 12: updating the actor",
        "",
        "progress    step 12/80, epoch 0.30/2, reward 0.412, accuracy 0.530, 1,834 tokens/s, 3m20s to go",
        "checkpoint  step 10, 40s ago, /workspace/runs/arithmetic/checkpoints/epoch_0_step_10 (kept: 5, 10)",
        "pods        coordinator 1/1 ready (1 replaced), trainer 1/1 ready (1 replaced), rollout 1/2 ready",
        "restarts    1 counted, 2 not counted; 1 of 3 since the last progress",
        "wrong       Ready is False: RolloutNotReady: 1 of 2 rollout pods are ready",
        "failures    3m20s ago  arithmetic-trainer-0: exit code 85 DeviceFailed: CUDA error: uncorrectable ECC more -> RestartSet",
        "next        grpo status arithmetic --follow",
        "            grpo logs arithmetic -f",
        "            grpo stop arithmetic",
    ]


def test_a_job_without_a_status_says_that_nobody_has_looked_at_it() -> None:
    text = snapshot(new_job(), NOW, say)
    assert "Pending" in text and "progress    –" in text and "none yet" in text
    assert "No operator has looked at this job yet" in text


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (with_condition(TRAINING, "Succeeded", "True"), "kubectl delete grpojob arithmetic -n ml"),
        (suspended(), "grpo resume arithmetic"),
        (with_condition(TRAINING, "Failed", "True", "InvalidData", "no column"), "correct what the message names"),
        (with_condition(TRAINING, "Failed", "True", "OutOfMemory"), "to try again"),
        (with_condition(TRAINING, "Failed", "True", "OutOfMemory"), "grpo logs arithmetic --role trainer"),
        (with_condition(TRAINING, "Scheduled", "False"), "kubectl describe pods -n ml -l grpo.dev/job=arithmetic"),
    ],
)
def test_the_next_step_fits_the_state(document: dict[str, Any], words: str) -> None:
    assert words in "\n".join(next_steps(document, say))


def test_a_suspended_job_is_not_wrong_for_having_no_pods() -> None:
    document = with_condition(suspended(), "Scheduled", "False")
    assert wrong(document) == []
    document = with_condition(TRAINING, "Progressing", "False", "Stopping")
    document["spec"]["suspend"] = True
    assert wrong(document) == []


def test_only_the_failure_is_wrong_with_a_failed_job() -> None:
    assert wrong(with_condition(TRAINING, "Failed", "True", "InvalidData", "no column")) == [
        "Failed is True: InvalidData: no column"
    ]


def test_the_table_has_a_line_for_each_job() -> None:
    other = new_job()
    other["metadata"] |= {"name": "a-new-one", "creationTimestamp": "2026-09-21T14:13:10Z"}
    lines = [" ".join(line.split()) for line in table([TRAINING, other], NOW, namespaces=False).splitlines()]
    assert lines == [
        "NAME STATE STEP EPOCH REWARD CHECKPOINT TRAINERS ROLLOUTS RESTARTS AGE",
        "a-new-one – – – – – – – – 10s",
        "arithmetic Training 12/80 0.30 0.412 10 1/1 1/2 1 1h00m",
    ]
    assert table([TRAINING], NOW, namespaces=True).splitlines()[1].startswith("ml")


@pytest.mark.parametrize(
    ("since", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m00s"), (3599, "59m59s"), (7260, "2h01m"), (90000, "1d1h"), (-5, "0s")],
)
def test_ages(since: int, text: str) -> None:
    assert age(NOW - since, NOW) == text


def test_a_message_of_several_lines_stays_one_line() -> None:
    assert "uncorrectable ECC more -> RestartSet" in " ".join(snapshot(job(), NOW, say).split())
