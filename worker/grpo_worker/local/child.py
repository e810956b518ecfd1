"""One child process of a local run.

Invariant: a child never outlives its supervisor (the kernel kills it, see `entrypoint`), its output is in its own log file, and its end
is an exit code and a termination message, as a pod's.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from grpo_worker.environment import PARENT_PID, TERMINATION_LOG

TAIL_LINES = 12
KILL_SECONDS = 10.0  # for the kernel to end what was killed


@dataclass(frozen=True)
class ChildSpec:
    """How one process is started. `environment` is added to the supervisor's own."""

    name: str
    role: str
    job_file: Path
    log: Path | None  # None: our own output
    termination: Path
    environment: Mapping[str, str]


def command(spec: ChildSpec) -> list[str]:
    """What the process runs: the same as a pod's container."""
    return [sys.executable, "-m", "grpo_worker.entrypoint", spec.role, "--job", str(spec.job_file)]


def code_text(code: int | None) -> str:
    """For a person."""
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


class Child:
    """A running process; `code` is None until it ends."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        spec.termination.unlink(missing_ok=True)
        self._log_start = 0
        if spec.log is not None:
            spec.log.parent.mkdir(parents=True, exist_ok=True)
            self._log_start = spec.log.stat().st_size if spec.log.exists() else 0
        environment = {
            **os.environ,
            **spec.environment,
            TERMINATION_LOG: str(spec.termination),
            PARENT_PID: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        with nullcontext() if spec.log is None else spec.log.open("ab") as log:
            # A session of its own: the terminal's Ctrl-C reaches the supervisor alone.
            self._process = subprocess.Popen(
                command(spec),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """The process and what it started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def wait(self, timeout_seconds: float) -> bool:
        """True when it has ended."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_word(self) -> tuple[str, str]:
        """(reason, message) of the termination message, or what the exit code and the log's end tell."""
        try:
            word = json.loads(self.spec.termination.read_text())
            return str(word["reason"]), str(word["message"])
        except (OSError, ValueError, KeyError, TypeError):
            code = self.code
            what = f"ended with exit code {code}"
            if code is not None and code < 0:
                what = f"was killed by signal {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                what += " (by the kernel, if nobody else did: the machine ran out of memory, see dmesg)"
            return "Died", f"{what}\n{self._tail()}".rstrip()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _tail(self) -> str:
        if self.spec.log is None:
            return ""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(self._log_start, self.spec.log.stat().st_size - 8192))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])


def wait_for(children: Iterable[Child], limit_seconds: float) -> None:
    """Until all have ended, or the time is over."""
    deadline = time.monotonic() + limit_seconds
    for child in children:
        child.wait(max(0.0, deadline - time.monotonic()))


def end_all(children: Sequence[Child], grace_seconds: float) -> None:
    """SIGTERM to all; SIGKILL to those that are there after the time."""
    for child in children:
        child.terminate()
    wait_for(children, grace_seconds)
    for child in children:
        child.kill()
    wait_for(children, KILL_SECONDS)
