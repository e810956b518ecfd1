"""Values of environment variables reach the processes that need them, and nothing that a run writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import Run, Workspace

REWARD = '''
import os


def knows(sample):
    """Fails without its secrets."""
    assert (os.environ["IN_DOCUMENT"], os.environ["FROM_SHELL"]) == ("sesame-1", "sesame-2")
    return sum(character.isdigit() for character in sample.response) / max(len(sample.response), 1)
'''


def test_a_secret_is_in_no_file_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "sesame-2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    workspace = Workspace.make(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)
    reference = {"secretKeyRef": {"name": "s", "key": "k"}}
    job = workspace.job(
        reward={"function": "rewards.py:knows", "workers": 1},
        trainer={"totalSteps": 1, "testFreq": 0, "loggers": ["console", "jsonl", "tensorboard", "wandb"]},
        runtime={
            "env": [{"name": "IN_DOCUMENT", "value": "sesame-1"}, {"name": "FROM_SHELL", "valueFrom": reference}],
            "podTemplate": {
                "all": {"spec": {"containers": [{"name": "worker", "env": [{"name": "C", "value": "sesame-3"}]}]}}
            },
        },
    )
    with Run(workspace, job, "run") as run:
        assert run.finish() == 0, run.output()
    command = [sys.executable, "-m", "grpo_worker.cli.main", "report", str(run.directory)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    for expected in ("job.yaml", "report.html", "metrics.jsonl"):
        assert run.directory / expected in files
    assert any("wandb" in str(path) and path.suffix == ".wandb" for path in files)
    assert [path for path in files if b"sesame" in path.read_bytes()] == []
    assert b"IN_DOCUMENT" in (run.directory / "report.html").read_bytes()
    assert "sesame" not in run.output()
