"""One role of a job as a process: it ends with a code of the contract and a last word that says why."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_worker import entrypoint
from grpo_worker.environment import PARENT_PID, TERMINATION_LOG
from grpo_worker.errors import (
    CheckpointDamagedError,
    ConfigError,
    DataError,
    DeviceError,
    ExitCode,
    GRPOError,
    MemoryFullError,
    PeerLostError,
    RetryableError,
    StalledError,
    UsageError,
    YieldedError,
)

DOCUMENT = """\
apiVersion: grpo.dev/v1alpha1
kind: GRPOJob
metadata: {name: job}
spec:
  model: {path: model}
  data: {trainFiles: [train.parquet]}
  reward: {function: gsm8k}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(DOCUMENT)
    return path


@pytest.fixture
def termination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination"
    monkeypatch.setenv(TERMINATION_LOG, str(path))
    return path


def ending_with(monkeypatch: pytest.MonkeyPatch, end: Callable[[], int]) -> None:
    monkeypatch.setattr(entrypoint, "_run_role", lambda role, job, job_file: (end(), {"step": 9}))


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UsageError, 64), (DataError, 65), (RetryableError, 75), (ConfigError, 78), (YieldedError, 80), (CheckpointDamagedError, 81),
        (PeerLostError, 82), (StalledError, 83), (MemoryFullError, 84), (DeviceError, 85),
    ],
)  # fmt: skip
def test_an_error_becomes_its_exit_code_and_last_word(
    kind: type[GRPOError], code: int, job: Path, termination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> int:
        error = kind("what was wrong")
        error.context = {"step": 7, "checkpoint": "epoch_0_step_5"}
        raise error

    ending_with(monkeypatch, end)
    assert entrypoint.run("trainer", str(job)) == code
    word = {"reason": kind.reason, "message": "what was wrong", "step": 7, "checkpoint": "epoch_0_step_5"}
    assert json.loads(termination.read_text()) == word


def test_a_role_that_is_done_says_so(job: Path, termination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending_with(monkeypatch, lambda: int(ExitCode.DONE))
    assert entrypoint.run("coordinator", str(job)) == 0
    assert json.loads(termination.read_text()) == {"reason": "Completed", "message": "", "step": 9}


def test_an_unexpected_error_is_told_with_its_type(
    job: Path, termination: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ending_with(monkeypatch, lambda: 1 // 0)
    assert entrypoint.run("rollout", str(job)) == ExitCode.INTERNAL
    word = json.loads(termination.read_text())
    assert (word["reason"], word["message"].partition(":")[0]) == ("UnexpectedError", "ZeroDivisionError")
    assert "Traceback" in capsys.readouterr().err


def test_a_host_without_memory_is_tried_again_with_the_remedy(
    job: Path, termination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> int:
        raise MemoryError("cannot hold 9 bytes")

    ending_with(monkeypatch, end)
    assert entrypoint.run("coordinator", str(job)) == ExitCode.MEMORY
    word = json.loads(termination.read_text())
    assert word["reason"] == "OutOfMemory"
    assert (
        "coordinator: out of memory: cannot hold 9 bytes" in word["message"] and "runtime.resources" in word["message"]
    )


def test_the_code_of_a_rank_that_told_its_own_reason_is_passed_on(
    job: Path, termination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending_with(monkeypatch, lambda: 85)
    assert entrypoint.run("trainer", str(job)) == 85
    assert not termination.exists()


def test_a_document_with_errors_ends_with_64(job: Path, termination: Path) -> None:
    job.write_text(DOCUMENT + "  rollout: {n: 1}\n")
    assert entrypoint.run("coordinator", str(job)) == 64
    assert "rollout.n" in json.loads(termination.read_text())["message"]


def test_a_long_message_fits_what_the_kubelet_keeps(
    job: Path, termination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> int:
        raise DataError('"\n' * 5000)

    ending_with(monkeypatch, end)
    assert entrypoint.run("trainer", str(job)) == 65
    assert json.loads(termination.read_text())["reason"] == "InvalidData"
    assert termination.stat().st_size <= 4096


def test_a_termination_log_that_cannot_be_written_changes_nothing(
    job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TERMINATION_LOG, str(tmp_path / "nowhere" / "file"))
    ending_with(monkeypatch, lambda: 0)
    assert entrypoint.run("trainer", str(job)) == 0
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["trainer", "rollout"])
def test_a_role_that_is_told_to_use_a_gpu_says_at_once_that_there_is_none(
    job: Path, termination: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    job.write_text(job.read_text() + "  runtime: {device: cuda}\n")
    assert entrypoint.run(role, str(job)) == ExitCode.DEVICE
    word = json.loads(termination.read_text())
    assert word["reason"] == "DeviceFailed"
    assert "torch finds no GPU: the node has no NVIDIA driver" in word["message"]
    assert "(CUDA_VISIBLE_DEVICES is )" in word["message"]


def test_an_unknown_role_is_a_wrong_command_line(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        entrypoint.main(["driver", "--job", str(job)])
    assert end.value.code == 64
    assert "invalid choice" in capsys.readouterr().err


# A parent that starts a role whose work is to write its process id and wait for ever.
PARENT = """
import os, subprocess, sys
child = (
    "import os, sys, time, grpo_worker.entrypoint as e\\n"
    "def wait(role, job, job_file):\\n"
    "    open(sys.argv[1] + '.tmp', 'w').write(str(os.getpid())); os.rename(sys.argv[1] + '.tmp', sys.argv[1])\\n"
    "    time.sleep(1000)\\n"
    "e._run_role = wait\\n"
    "e.main(['trainer', '--job', sys.argv[2]])\\n"
)
environment = {**os.environ, "GRPO_PARENT_PID": str(os.getpid())}
subprocess.Popen([sys.executable, "-c", child, *sys.argv[1:]], env=environment, start_new_session=True).wait()
"""


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_dies_with_its_supervisor(job: Path, tmp_path: Path) -> None:
    marker = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(marker), str(job)])
    try:
        until(marker.exists)
        child = int(marker.read_text())
        assert running(child)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    until(lambda: not running(child), 10)


def test_a_child_whose_supervisor_has_gone_already_does_not_start(job: Path) -> None:
    environment = {**os.environ, PARENT_PID: "1"}
    done = subprocess.run(
        [sys.executable, "-m", "grpo_worker.entrypoint", "trainer", "--job", str(job)],
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == ExitCode.RETRY


def test_a_process_that_is_told_to_end_while_it_starts_ends_at_once(job: Path, tmp_path: Path) -> None:
    """Also as a container's first process, for which the kernel drops signals without a handler."""
    fifo, termination = tmp_path / "fifo.yaml", tmp_path / "termination"
    os.mkfifo(fifo)  # the process waits in the middle of its start, until somebody writes the document
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_worker.entrypoint", "coordinator", "--job", str(fifo)],
        env={**os.environ, TERMINATION_LOG: str(termination)},
    )
    try:
        writer = os.open(fifo, os.O_WRONLY)  # returns when the process has opened it for reading
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        os.close(writer)
    finally:
        process.kill()
    assert json.loads(termination.read_text())["reason"] == "Terminated"


def test_the_first_process_of_a_container_hears_sigterm_while_it_still_imports() -> None:
    program = (
        "import os, signal\n"
        "os.getpid = lambda: 1\n"  # as in a container
        "import grpo_worker.first_process\n"
        "signal.raise_signal(signal.SIGTERM)\n"
        "signal.pause()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=30, check=False)
    assert done.returncode == 143
