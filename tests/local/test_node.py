"""A colocated node's container: it ends with its trainer, and an engine that dies is started again in it.

The container's process is the real one, its children are small programs that end as a test tells them to (`fake_role.py`).
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_supervisor import FAKE_ROLE, job

from grpo_worker.local import child, node
from grpo_worker.local.placement import Machine


class Pod:
    """What a node's container finds around it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.word = folder, folder / "word"
        self.word.touch()  # the kubelet's: it can be written, not replaced
        for name, value in {
            "GRPO_RUN_DIR": folder, "GRPO_TERMINATION_LOG": self.word, "GRPO_ROLLOUT_PORT": 7604, "NODE_RANK": 1, "OMP_NUM_THREADS": 3,
        }.items():  # fmt: skip
            patch.setenv(name, str(value))
        patch.setattr(child, "command", lambda spec: [sys.executable, str(FAKE_ROLE), spec.role])
        patch.setattr(node, "POLL_SECONDS", 0.02)
        patch.setattr(Machine, "here", classmethod(lambda cls: Machine(8, ("4", "5"))))
        self.before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ends(self, name: str, *directives: dict[str, Any]) -> None:
        (self.folder / f"{name}.ends").write_text("\n".join(map(json.dumps, directives)))

    def starts(self, name: str) -> list[dict[str, str]]:
        file = self.folder / "starts.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        starts = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be in writing
        return [start["environment"] for start in starts if start["name"] == name]

    def run(self, then: Callable[[], None] = lambda: None) -> int:
        """The container's exit code. `then` runs beside it."""
        beside = threading.Thread(target=then)
        beside.start()
        try:
            document = job(
                placement="Colocated", trainer={"nodes": 2, "gpusPerNode": 2}, network={"rendezvousPort": 7700}
            )
            return node.run(document, str(self.folder / "job.yaml"))
        finally:
            beside.join()
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def finish(self) -> None:
        (self.folder / "finish").touch()

    def reasons(self) -> list[str]:
        return [json.loads(line)["reason"] for line in (self.folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pod:
    return Pod(tmp_path, monkeypatch)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_nodes_engines_are_the_next_of_the_job_and_have_the_ranks_gpus(pod: Pod) -> None:
    names = ("trainer-1", "rollout-2", "rollout-3")

    def finish() -> None:
        until(lambda: all(pod.starts(name) for name in names))
        pod.finish()

    assert pod.run(finish) == 0
    seen = {name: pod.starts(name)[0] for name in names}
    assert [seen[name]["CUDA_VISIBLE_DEVICES"] for name in names] == ["4,5", "4", "5"]
    assert [seen[name].get("GRPO_REPLICA_INDEX") for name in names[1:]] == ["2", "3"]
    assert [seen[name]["GRPO_ROLLOUT_PORT"] for name in names[1:]] == ["7604", "7605"]
    assert seen["trainer-1"]["NODE_RANK"] == "1"
    assert {environment["OMP_NUM_THREADS"] for environment in seen.values()} == {"3"}, (
        "the operator knows the pod's cores"
    )


def test_an_engine_that_dies_is_started_again_and_the_trainer_goes_on(pod: Pod) -> None:
    pod.ends("rollout-3", {"code": 85, "reason": "EngineDead", "message": "a step failed"}, {"signal": 9}, {})

    def finish() -> None:
        until(lambda: len(pod.starts("rollout-3")) == 3)
        pod.finish()

    assert pod.run(finish) == 0
    assert [len(pod.starts(name)) for name in ("trainer-1", "rollout-2", "rollout-3")] == [1, 1, 3]
    assert pod.reasons() == ["EngineDead", "Died"]


def test_an_engine_that_no_restart_mends_ends_the_container_with_its_word(pod: Pod) -> None:
    pod.ends("rollout-2", {"code": 78, "reason": "InvalidConfiguration", "message": "does not fit on a device"})
    assert pod.run() == 78
    assert json.loads(pod.word.read_text()) == {"reason": "InvalidConfiguration", "message": "does not fit on a device"}
    assert len(pod.starts("rollout-2")) == 1


def test_an_engine_that_dies_again_and_again_uses_the_budget_up(pod: Pod) -> None:
    pod.ends("rollout-2", *[{"code": 84, "reason": "OutOfMemory", "message": "no memory"}] * 5)
    assert pod.run() == 84
    assert len(pod.starts("rollout-2")) == 3, "failurePolicy.maxRestarts is 2"


@pytest.mark.parametrize(
    ("end", "code"), [({"code": 82, "reason": "PeerLost", "message": "gone"}, 82), ({"signal": 9}, 137)]
)
def test_the_container_ends_with_its_trainer(pod: Pod, end: dict[str, Any], code: int) -> None:
    pod.ends("trainer-1", end)
    assert pod.run() == code
    word = pod.word.read_text()
    assert (json.loads(word)["reason"] == "PeerLost") if "code" in end else word == ""


def test_who_is_told_to_end_tells_the_trainer_and_engines_end_behind_it(pod: Pod) -> None:
    pod.ends("trainer-1", {"when_told": 80})

    def tell() -> None:
        until(lambda: bool(pod.starts("trainer-1") and pod.starts("rollout-2")))
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    assert pod.run(tell) == 80
    assert json.loads(pod.word.read_text())["reason"] == "Terminated"
