"""What a process says: a line for people, and for collectors an object that tells the process and the moment."""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpo_worker import logs
from grpo_worker.environment import LOG_FACTS, LOG_FORMAT
from grpo_worker.metric_loggers.console import ConsoleLogger
from grpo_worker.metric_loggers.events import EventLog


@contextmanager
def this_process_says(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logs of this process, of which nothing stays."""
    root, moment = logging.getLogger(), dict(logs._moment)
    handlers, level = list(root.handlers), root.level
    monkeypatch.setenv(LOG_FACTS, "{}")
    root.handlers.clear()  # pytest's own, which `set_up` would close
    logging.captureWarnings(False)  # else what an earlier test left on, and pytest took back, is on by name alone
    logs.set_up(job="math", namespace="team-a", role="trainer", member="trainer-1", attempt=2, rank=None)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:], logs._moment = handlers, moment
        root.setLevel(level)


def test_a_json_line_says_which_process_and_when(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LOG_FORMAT, "json")
    with this_process_says(monkeypatch):
        logs.at(step=7)
        logs.at(version=6)
        logging.getLogger("grpo_worker.trainer").warning("lost %d of\n%d", 1, 2)
        warnings.warn("é is odd", UserWarning, stacklevel=1)
        try:
            raise ValueError("no")
        except ValueError:
            logging.getLogger("grpo_worker.trainer").exception("update failed")
    first, second, third = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "warning", "job": "math", "namespace": "team-a", "role": "trainer", "member": "trainer-1", "attempt": 2,
        "step": 7, "version": 6, "logger": "grpo_worker.trainer", "message": "lost 1 of\n2",
    }  # fmt: skip
    assert "é is odd" in second["message"]
    assert third["level"] == "error" and third["exception"].splitlines()[-1] == "ValueError: no"


def test_on_a_terminal_the_same_is_a_line_to_read_and_json_reads_as_that_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def say() -> list[str]:
        logging.getLogger("grpo_worker.trainer").warning("slow")
        EventLog(tmp_path / "events.jsonl", "trainer-1").emit("info", "Started", "it runs")
        try:
            raise ValueError("no")
        except ValueError:
            logging.getLogger("grpo_worker.trainer").exception("update failed")
        return capsys.readouterr().err.splitlines()

    with this_process_says(monkeypatch):
        text = say()
        assert [line[9:] for line in text[:3]] == [
            "trainer-1: warning: slow",
            "trainer-1: it runs",
            "trainer-1: error: update failed",
        ]
        assert text[-1] == "ValueError: no"
        monkeypatch.setenv(LOG_FORMAT, "json")
        lines = say()
        assert [json.loads(line).get("reason") for line in lines] == [None, "Started", None]
        read = "\n".join(logs.readable(line) for line in lines).splitlines()
        assert [line[8:] for line in read[:3]] == [line[8:] for line in text[:3]] and read[-1] == "ValueError: no"


def test_the_line_of_a_step_is_the_message_of_a_json_line_in_a_pod(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with this_process_says(monkeypatch):
        ConsoleLogger(total_steps=4).log(3, {"epoch": 0.5})
        plain = capsys.readouterr().out
        monkeypatch.setenv(LOG_FORMAT, "json")
        ConsoleLogger(total_steps=4).log(3, {"epoch": 0.5})
    entry = json.loads(capsys.readouterr().out)
    assert plain == "step 3/4  epoch 0.50\n"
    assert (entry["message"], entry["step"], entry["job"]) == (plain.strip(), 3, "math")


@pytest.mark.parametrize(
    "line", ["", "plain", "{", '{"time": 3}', '{"time": "x", "level": "info", "message": "m"}', "[1]"]
)
def test_what_is_no_line_of_ours_is_shown_as_it_is(line: str) -> None:
    assert logs.readable(line) == line


def test_a_worker_process_speaks_json_from_its_first_words(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "apiVersion: grpo.dev/v1alpha1\nkind: GRPOJob\nmetadata: {name: math, namespace: team-a}\n"
        "spec: {model: {path: nowhere}, data: {trainFiles: [none.parquet]}, reward: {function: 'r.py:f'}, runtime: {device: cpu}}\n"
    )
    environment = {
        **os.environ, LOG_FORMAT: "json", "GRPO_MEMBER_NAME": "coordinator", "GRPO_ATTEMPT": "3", "GRPO_JOB_TOKEN": "t" * 32,
        "GRPO_RUN_DIR": str(tmp_path), "GRPO_COORDINATOR_PORT": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "grpo_worker.entrypoint", "coordinator", "--job", str(job)]
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 65, ended.stderr
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert {(line["job"], line["namespace"], line["role"], line["attempt"]) for line in lines} == {
        ("math", "team-a", "coordinator", 3)
    }
    assert "model.path" in lines[-1]["message"] and lines[-1]["level"] == "error"
