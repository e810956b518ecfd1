"""Two trainer ranks and two engines that have the same devices in turn: whoever dies, the others go on, and every prompt is trained on once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from run_helpers import LIMIT_SECONDS, Run, Workspace, children
from test_failures import prompts_in_data_order

from grpo_worker.config import load_job, written_document
from grpo_worker.config.yaml_text import yaml_text
from grpo_worker.ports import free_port

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


def test_two_nodes_as_a_cluster_has_them_train_to_the_end_and_one_replaces_its_engine(tmp_path: Path) -> None:
    """The commands of a colocated job's three pods, here without a cluster: coordinator, and a node each for two ranks."""
    workspace = Workspace.make(tmp_path)
    job = load_job(
        workspace.job(placement="Colocated", trainer={"nodes": 2, "totalSteps": 40, "totalEpochs": 48, "testFreq": 0})
    )
    run, ports = tmp_path / "run", [free_port() for _ in range(4)]
    run.mkdir()
    (run / "job.yaml").write_text(yaml_text(written_document(job)))
    common = {
        "GRPO_RUN_DIR": str(run), "GRPO_JOB_TOKEN": "token", "GRPO_COORDINATOR_URL": f"http://127.0.0.1:{ports[0]}",
        "GRPO_COORDINATOR_PORT": str(ports[0]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[1]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def start(role: str, name: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "grpo_worker.entrypoint", role, "--job", str(run / "job.yaml")]
        variables = {
            **os.environ,
            **common,
            **environment,
            "GRPO_MEMBER_NAME": name,
            "GRPO_TERMINATION_LOG": str(tmp_path / name),
        }
        (tmp_path / name).touch()
        with (tmp_path / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=workspace.root, env=variables, stdout=log, stderr=subprocess.STDOUT)

    pods = {"coordinator": start("coordinator", "coordinator")}
    for node in range(2):
        pods[f"trainer-{node}"] = start(
            "node", f"trainer-{node}", NODE_RANK=str(node), GRPO_ROLLOUT_PORT=str(ports[2 + node])
        )
    try:
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert all(pod.poll() is None for pod in pods.values()), [
                (tmp_path / f"{n}.log").read_text()[-2000:] for n in pods
            ]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        engine = next(pid for name, pid in children(pods["trainer-1"].pid).items() if name == "rollout-1")
        os.kill(engine, signal.SIGKILL)
        codes = {name: pod.wait(LIMIT_SECONDS) for name, pod in pods.items()}
    finally:
        for pod in pods.values():
            pod.kill()
    assert codes == {"coordinator": 0, "trainer-0": 0, "trainer-1": 0}
    words = {name: json.loads((tmp_path / name).read_text())["reason"] for name in pods}
    assert set(words.values()) == {"Completed"}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[1]["weight_sync/engines"] == lines[-1]["weight_sync/engines"] == 2
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (died,) = [event for event in events if event["reason"] == "Died"]
    assert died["role"] == "trainer-1"
    assert "rollout-1 ended (signal SIGKILL)" in died["message"]
