"""The page of `grpo watch`: made of the files of a run that goes on, and loaded again only while it does."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from grpo_worker.errors import DataError
from grpo_worker.report import live
from grpo_worker.report.live import LivePage, runs_now, watch_run

REFRESH = '<meta http-equiv="refresh"'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "demo"
    directory.mkdir()
    return directory


def step(run: Path, number: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": number, "critic/score/mean": number / 10, "timing_s/gen": 1.0, "timing_s/step": 2.0})
            + "\n"
        )


def test_it_follows_the_run_and_stops_with_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0)
    page = LivePage(run, partial(runs_now, run))
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runs_now(run)
        assert REFRESH in page.text() and "no metrics.jsonl" in page.text()
        for number in (1, 2, 3):
            step(run, number)
        live_text = page.text()
        monkeypatch.setattr(live, "REFRESH_SECONDS", 5)
    assert not runs_now(run)
    page = LivePage(run, partial(runs_now, run))
    assert REFRESH not in page.text() and "Reward" in page.text()
    assert "0.300" in live_text or "0.3" in live_text


def test_a_page_is_made_once_for_all_who_ask_in_the_same_seconds(run: Path) -> None:
    step(run, 1)
    page = LivePage(run, partial(runs_now, run))
    first = page.text()
    step(run, 2)
    assert page.text() is first


def test_the_command_serves_it_until_it_is_interrupted(run: Path) -> None:
    step(run, 1)
    step(run, 2)
    command = [sys.executable, "-m", "grpo_worker.cli.main", "watch", str(run)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        with urllib.request.urlopen(found[0], timeout=20) as response:
            text = response.read().decode()
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "GRPO run" in text and REFRESH not in text
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run directory"):
        watch_run(tmp_path / "nothing", 0)
