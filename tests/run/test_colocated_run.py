"""Two trainer ranks and two engines that have the same devices in turn: whoever dies, the others go on, and every prompt is trained on once."""

import os
import signal
from pathlib import Path
from typing import Any

from run_helpers import Run, Workspace
from test_failures import prompts_in_data_order

STEPS, BATCH = 60, 8


def test_engines_and_trainer_take_turns_and_survive_each_other(tmp_path: Path, monkeypatch: Any) -> None:
    workspace = Workspace.make(tmp_path)
    job = workspace.job(
        placement="Colocated",
        trainer={"gpusPerNode": 2, "totalSteps": STEPS, "totalEpochs": 16, "testFreq": 20},
        checkpoint={"saveFreq": 10},
    )
    with Run(workspace, job, "run") as run:
        run.wait_until(lambda: run.steps() >= 2)
        first = run.pids()
        assert sorted(first) == ["coordinator", "rollout-0", "rollout-1", "trainer-0"]
        os.kill(first["rollout-1"], signal.SIGKILL)
        run.wait_until(lambda: run.pids().get("rollout-1", first["rollout-1"]) != first["rollout-1"])
        killed_at = run.steps()
        run.wait_until(
            lambda: run.lines("metrics.jsonl")[-1].get("weight_sync/engines") == 2 and run.steps() > killed_at + 1
        )
        assert run.pids()["trainer-0"] == first["trainer-0"], "only the dead engine was replaced"

        warm = run.pids()
        os.kill(warm["trainer-0"], signal.SIGKILL)
        run.wait_until(lambda: run.pids().get("trainer-0", warm["trainer-0"]) != warm["trainer-0"])
        assert run.finish() == 0, run.output()
        joined = [event["message"] for event in run.lines("events.jsonl") if event["reason"] == "RolloutJoined"]
        assert any(message.startswith("rollout-1 serves weights") for message in joined)

    metrics = run.lines("metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(line["timing_s/sleep"] > 0 for line in metrics)
    by_pairs = [line for line in metrics if line["weight_sync/engines"] and line["weight_sync/pull_seconds"] == 0]
    assert len(by_pairs) >= STEPS // 2
    ledger = run.lines("ledger.jsonl")
    assert all(not line["failed"] and not line["filtered"] for line in ledger)
    trained = [uid for line in ledger for uid in line["trained"]]
    assert trained == prompts_in_data_order(workspace, job, STEPS * BATCH, monkeypatch)
