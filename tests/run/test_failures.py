"""A run with two rollout servers, ahead of the trainer by one version: killed, interrupted, resumed; every prompt exactly once."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from run_helpers import Run, Workspace

from grpo_worker.config import load_job
from grpo_worker.coordinator.prompts import open_training_data
from grpo_worker.data.tokenizer import load_tokenizer

STEPS, BATCH = 16, 8
STOPPED_SECONDS = 8.0  # several steps: time for the next prompts to be sent to a server that has none
STALENESS = "training/off_policy/trajectory_staleness/max"


def prompts_in_data_order(workspace: Workspace, job: Path, count: int, monkeypatch: Any) -> list[str]:
    monkeypatch.chdir(workspace.root)
    spec = load_job(job).spec
    data = open_training_data(spec, load_tokenizer(Path(spec.model.path)).tokenizer)
    return [prompt.uid for prompt, _ in zip(data.iterate(), range(count), strict=False)]


def generations(run: Run) -> int:
    """How often prompts have been sent out."""
    return sum(event["reason"] == "Rollout" for event in run.lines("events.jsonl"))


def kill_with_a_request(run: Run, pid: int) -> None:
    """Stop a server first: what it has, or is sent next, it cannot answer any more, so the kill meets a request under way."""
    sent, until = generations(run), time.monotonic() + STOPPED_SECONDS
    os.kill(pid, signal.SIGSTOP)
    run.wait_until(lambda: generations(run) > sent or time.monotonic() > until)
    time.sleep(0.5)  # the event is written just before the requests
    os.kill(pid, signal.SIGKILL)


def test_no_prompt_is_lost_or_trained_twice(tmp_path: Path, monkeypatch: Any) -> None:
    workspace = Workspace.make(tmp_path)
    job = workspace.job(
        data={
            "trainFiles": ["train.parquet"],
            "trainBatchSize": BATCH,
            "maxPromptLength": 16,
            "maxResponseLength": 96,
        },
        rollout={"n": 4, "replicas": 2, "minReplicas": 2, "maxStaleness": 1, "maxNumSeqs": 8},
        trainer={"totalSteps": STEPS, "totalEpochs": 8, "testFreq": 0},
        checkpoint={"saveFreq": 4},
    )
    with Run(workspace, job, "run") as run:
        run.wait_until(lambda: run.steps() >= 2)
        old = run.pids()
        kill_with_a_request(run, old["rollout-1"])
        run.wait_until(lambda: run.pids().get("rollout-1", old["rollout-1"]) != old["rollout-1"])
        killed_at = run.steps()
        run.wait_until(lambda: run.steps() > killed_at + 1)  # the other one carries on meanwhile
        assert {name: pid for name, pid in run.pids().items() if name != "rollout-1"} == {
            name: pid for name, pid in old.items() if name != "rollout-1"
        }, "only the dead server was replaced"
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 80, run.output()
        assert "goes on from its checkpoint with: grpo run" in run.output()
        stopped_at = run.steps()
        assert stopped_at < STEPS, "interrupted too late to show anything"
        lost = [e for e in run.lines("events.jsonl") if e["reason"] in ("RolloutLost", "WeightSyncFailed")]
        assert any("rollout-1" in event["message"] for event in lost), "the kill met no request under way"

    with Run(workspace, job, "run") as resumed:
        resumed.wait_until(lambda: resumed.steps() >= stopped_at + 2)
        os.kill(resumed.pids()["trainer-0"], signal.SIGKILL)
        warm = {name: pid for name, pid in resumed.pids().items() if name.startswith("rollout")}
        resumed.wait_until(lambda: resumed.steps() >= STEPS - 1)
        after = {name: pid for name, pid in resumed.pids().items() if name.startswith("rollout")}
        assert after == warm, "rollout servers stay warm while trainer and coordinator restart"
        assert resumed.finish() == 0, resumed.output()

    ledger = resumed.lines("ledger.jsonl")
    assert [line["step"] for line in ledger] == list(range(1, STEPS + 1))
    assert all(not line["failed"] and not line["filtered"] for line in ledger)
    trained = [uid for line in ledger for uid in line["trained"]]
    assert trained == prompts_in_data_order(workspace, job, STEPS * BATCH, monkeypatch)

    metrics = resumed.lines("metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(0 <= line[STALENESS] <= 1 for line in metrics)
    assert any(line[STALENESS] == 1 for line in metrics), "generation never overlapped training"
    # Scored by the version that sampled them: a server with other weights than it claims would show here.
    assert all(line["training/rollout_logprobs_abs_diff_max"] < 1e-4 for line in metrics if line[STALENESS] == 0)
