"""Samples, and a module of reward functions that misbehave in every way the pool has to survive."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_worker.rewards.base import RewardInput

MISBEHAVING = '''
import ctypes, os, re, subprocess, sys, time
from pathlib import Path

from grpo_worker.rewards import TryAgain

def echo(sample):
    return {"score": float(sample.response), "pid": os.getpid()}

def misbehave(sample, folder=""):
    """Does what the response says; a number is its own score."""
    word = sample.response
    if word == "raise":
        raise RuntimeError("the verifier is broken")
    if word == "sys.exit":
        sys.exit(3)
    if word == "nan":
        return float("nan")
    if word == "inf":
        return {"score": float("inf")}
    if word == "text":
        return "1.0"
    if word == "none":
        return None
    if word == "no score":
        return {"acc": 1.0}
    if word == "loop":
        while True:
            pass
    if word == "leave a session":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path(folder, "session").write_text(str(child.pid))
        time.sleep(600)
    if word == "sleep":
        time.sleep(1000)
    if word == "regex":  # backtracks for ages in C, holding the GIL
        return float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))
    if word == "os._exit":
        os._exit(7)
    if word == "segfault":
        ctypes.string_at(0)
    if word == "crash once":
        marker = Path(folder, "crashed")
        if not marker.exists():
            marker.touch()
            os._exit(7)
        return 1.0
    if word == "child and hang":
        child = subprocess.Popen(["sleep", "1000"])
        Path(folder, "child.tmp").write_text(str(child.pid))
        os.rename(Path(folder, "child.tmp"), Path(folder, "child"))
        time.sleep(1000)
    if word == "leave a child":
        return {"score": 1.0, "child": subprocess.Popen(["sleep", "1000"]).pid}
    if word == "fork":
        child = os.fork()
        if child == 0:
            os.write(1, b"from a forked child")
            os._exit(0)
        return float(os.waitpid(child, 0)[1] == 0)
    if word == "fork and crash":  # the child lives on, with all that it inherited
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(7)
    if word == "print":
        print("x" * 100_000)
        os.write(1, b"raw bytes on standard output")
        subprocess.run(["echo", "from a child"], check=True)
        return float(sys.stdin.read() == "")
    if word == "memory":
        return float(len(bytearray(8 << 30)))
    if word.startswith("busy"):  # N times, or for ever
        asked = Path(folder, word)
        number = len(asked.read_text()) if asked.exists() else 0
        asked.write_text("x" * (number + 1))
        if number < int(word[5:] or 10**9):
            raise TryAgain("the judge answered 503")
        return 1.0
    if word == "token":
        return float("GRPO_JOB_TOKEN" in os.environ)
    return float(word)
'''


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a user: `misbehaving.py` is in it."""
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sample() -> Callable[..., RewardInput]:
    def make(response: str, ground_truth: str = "", **data: Any) -> RewardInput:
        return RewardInput(prompt="", response=response, ground_truth=ground_truth, data=data)

    return make
