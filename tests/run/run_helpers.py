"""Whole runs in tests: a tiny untrained model, real data files, a dense reward, real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from grpo_worker.data.write import write_shuffled
from grpo_worker.demo.model import build_model
from grpo_worker.demo.tasks import split_problems
from grpo_worker.demo.tokenizer import build_tokenizer

LIMIT_SECONDS = 280.0

REWARD = '''
def digits(sample):
    """Share of digits: an untrained model's samples differ in it."""
    return sum(character.isdigit() for character in sample.response) / max(len(sample.response), 1)
'''


@dataclass(frozen=True)
class Workspace:
    """A directory with model, data and reward function, from which runs are started."""

    root: Path

    @classmethod
    def make(cls, root: Path, prompts: int = 64) -> "Workspace":
        build_model(1).save_pretrained(root / "model")
        build_tokenizer().save_pretrained(root / "model")
        train, held_out = split_problems(1, prompts, 8)
        for name, problems in (("train", train), ("test", held_out)):
            rows = [{"prompt": p.prompt, "response": "", "reward": p.answer} for p in problems]
            write_shuffled(pa.Table.from_pylist(rows), root / f"{name}.parquet", seed=1)
        (root / "rewards.py").write_text(REWARD)
        return cls(root)

    def job(self, **sections: Any) -> Path:
        """A GRPOJob file of 4 steps of 8 prompts x 4 samples; `sections` are merged over it, section by section."""
        spec: dict[str, Any] = {
            "model": {"path": "model"},
            "data": {
                "trainFiles": ["train.parquet"],
                "trainBatchSize": 8,
                "maxPromptLength": 16,
                "maxResponseLength": 12,
            },
            "reward": {"function": "rewards.py:digits", "workers": 1},
            "actor": {"ppoMiniBatchSize": 4, "optim": {"lr": 1e-3}},
            "rollout": {"n": 4},
            "trainer": {"totalSteps": 4, "totalEpochs": 8, "testFreq": 0},
            "checkpoint": {"saveFreq": 1},
            "network": {"heartbeatSeconds": 0.3},
            "failurePolicy": {"backoffSeconds": 0.2},
        }
        for name, values in sections.items():
            spec[name] = spec.get(name, {}) | values if isinstance(values, dict) else values
        document = {"apiVersion": "grpo.dev/v1alpha1", "kind": "GRPOJob", "metadata": {"name": "test"}, "spec": spec}
        path = self.root / "job.yaml"
        path.write_text(yaml.safe_dump(document))
        return path


class Run:
    """A `grpo run` of its own process group."""

    def __init__(self, workspace: Workspace, job: Path, directory: str, *arguments: str) -> None:
        self.directory = workspace.root / directory
        self._output = workspace.root / f"{directory}.out"
        self._log = self._output.open("ab")
        command = [sys.executable, "-m", "grpo_worker.cli.main", "run", str(job), "--run-dir", directory, *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, cwd=workspace.root, env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )

    def finish(self, limit_seconds: float = LIMIT_SECONDS) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the run did not end:\n{self.output()[-3000:]}") from None

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], limit_seconds: float = LIMIT_SECONDS) -> None:
        deadline = time.monotonic() + limit_seconds
        while not condition():
            assert self.process.poll() is None, (
                f"the run ended with {self.process.returncode}:\n{self.output()[-3000:]}"
            )
            assert time.monotonic() < deadline, f"waited too long:\n{self.output()[-3000:]}"
            time.sleep(0.05)

    def pids(self) -> dict[str, int]:
        """Process ids of the run's children by their member name."""
        return children(self.process.pid)

    def kill_everything(self) -> None:
        """kill -9 of the supervisor and of every child."""
        for pid in [self.process.pid, *self.pids().values()]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> int:
        return max((line["step"] for line in self.lines("metrics.jsonl")), default=-1)

    def checkpoints(self) -> list[str]:
        root = self.directory / "checkpoints"
        return sorted(path.name for path in root.glob("epoch_*")) if root.exists() else []

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill_everything()
        self._log.close()


def children(parent: int) -> dict[str, int]:
    """Process ids of a supervisor's children by their member name."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(status[1]) == parent:
            name = next((v for v in environment if v.startswith(b"GRPO_MEMBER_NAME=")), b"=").split(b"=")[1].decode()
            found[name] = int(entry.name)
    return found


UNREPEATABLE: Sequence[str] = ("startup_s/", "timing_s/", "timing_per_token_ms/", "perf/", "weight_sync/")


def repeatable(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without times, rates and memory."""
    return [{key: value for key, value in line.items() if not key.startswith(tuple(UNREPEATABLE))} for line in metrics]
