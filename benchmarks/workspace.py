"""Whole runs to measure: a tiny untrained model, data, a reward function, and `grpo run` as a process.

Invariant: a run is the command that a user types, with its processes, sockets and files; nothing of it is imported here.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.memory import process_tree

REWARD = '''
def digits(sample):
    """Share of digits: an untrained model's samples differ in it."""
    return sum(character.isdigit() for character in sample.response) / max(len(sample.response), 1)
'''
STOP_SECONDS = 30.0


def make_workspace(root: Path, prompts: int) -> None:
    """The demo's model (400 thousand parameters) before its warm-up, `prompts` additions, a dense reward."""
    import pyarrow as pa

    from grpo_worker.data.write import write_shuffled
    from grpo_worker.demo.model import build_model
    from grpo_worker.demo.tasks import split_problems
    from grpo_worker.demo.tokenizer import build_tokenizer

    build_model(1).save_pretrained(root / "model")
    build_tokenizer().save_pretrained(root / "model")
    problems, _ = split_problems(1, prompts, 0)
    rows = [{"prompt": problem.prompt, "response": "", "reward": problem.answer} for problem in problems]
    write_shuffled(pa.Table.from_pylist(rows), root / "train.parquet", seed=1)
    (root / "rewards.py").write_text(REWARD)


def write_job(root: Path, steps: int, prompts: int, samples: int, save_freq: int) -> Path:
    """The demo's job on the workspace's files, with a save every `save_freq` steps and no validation."""
    spec: dict[str, Any] = {
        "model": {"path": "model"},
        "data": {
            "trainFiles": ["train.parquet"],
            "trainBatchSize": prompts,
            "maxPromptLength": 16,
            "maxResponseLength": 24,
        },
        "reward": {"function": "rewards.py:digits", "workers": 2},
        "actor": {"ppoMiniBatchSize": prompts, "optim": {"lr": 1e-4}},
        "rollout": {"n": samples},
        "trainer": {"totalSteps": steps, "testFreq": 0},
        "checkpoint": {"saveFreq": save_freq},
    }
    document = {"apiVersion": "grpo.dev/v1alpha1", "kind": "GRPOJob", "metadata": {"name": "bench"}, "spec": spec}
    path = root / "job.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


class Run:
    """A `grpo run` under way in `root`, its files below `root/run`."""

    def __init__(self, root: Path, process: subprocess.Popen[bytes]) -> None:
        self.root = root
        self.process = process

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are whole by now."""
        path = self.root / "run" / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps(self) -> int:
        return max((line["step"] for line in self.metrics()), default=0)

    def require(self, deadline: float) -> None:
        """Raises SystemExit, with the end of the output, when the run failed or is over the deadline."""
        code = self.process.poll()
        if code not in (None, 0) or time.monotonic() > deadline:
            tail = (self.root / "run.out").read_text(errors="replace")[-3000:]
            raise SystemExit(f"the run {'took too long' if code is None else f'ended with {code}'}:\n{tail}")


@contextmanager
def grpo_run(root: Path, job: Path) -> Iterator[Run]:
    """Start the run; whatever of it still lives at the end is ended."""
    command = [sys.executable, "-m", "grpo_worker.cli.main", "run", str(job), "--run-dir", "run"]
    with (root / "run.out").open("wb") as output:
        process = subprocess.Popen(command, cwd=root, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield Run(root, process)
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the supervisor to end its processes at once (two signals), and reap it."""
    if process.poll() is not None:
        return
    known = set(process_tree(process.pid))
    process.terminate()
    time.sleep(0.5)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)
        raise RuntimeError(f"the run did not end; left over may be: {sorted(known)}") from None
