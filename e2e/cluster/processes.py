"""The processes of one cluster: each carries the cluster's folder in its environment, so all can be found again.

Nothing has to be written down for the clean-up: whoever ends a cluster asks the kernel which processes are its own, which is right
after a crash at any line and never hits a process that reuses an id.
Attached processes (of a test) die with the process that started them, even when that is killed with -9; detached ones stay.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ClusterError, log_tail
from .host import wait_until

MARKER = "GRPO_E2E_CLUSTER"
STOP_SECONDS = 10


class Processes:
    """Starts processes that belong to the cluster in `directory`; their output goes to `directory`/log."""

    def __init__(self, directory: Path, *, attached: bool) -> None:
        self.directory = directory
        self.attached = attached
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        (directory / "log").mkdir(parents=True, exist_ok=True)

    def log(self, name: str) -> Path:
        return self.directory / "log" / f"{name}.log"

    def start(
        self,
        name: str,
        command: Sequence[object],
        *,
        environment: Mapping[str, str] | None = None,
        pass_descriptors: Sequence[int] = (),
    ) -> None:
        """Start a process in a session of its own (a Ctrl-C at the terminal is for its owner to act on)."""
        words = [str(word) for word in command]
        if self.attached:
            if threading.current_thread() is not threading.main_thread():
                # The kernel's parent-death signal follows the thread that forked, not the process.
                raise ClusterError("Start a control plane in the main thread: its processes end with the thread.")
            words = ["setpriv", "--pdeathsig", "KILL", "--", *words]
        with self.log(name).open("wb") as log:
            self._started[name] = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={**os.environ, **(environment or {}), MARKER: str(self.directory)},
                start_new_session=True,
                pass_fds=pass_descriptors,
            )

    def check(self) -> None:
        """Raise ClusterError with the log of the first process that has ended."""
        for name, process in self._started.items():
            if process.poll() is not None:
                raise ClusterError(f"{name} ended with code {process.returncode}.\n{log_tail(self.log(name))}")

    def kill(self) -> None:
        """End what this object started, at once: its data goes with it, so nobody needs a graceful end."""
        for process in self._started.values():
            process.kill()
        for process in self._started.values():
            process.wait(STOP_SECONDS)
        self._started.clear()


def processes_of(directory: Path) -> dict[int, str]:
    """Id and name of each process on this machine that carries the cluster's marker."""
    marker = f"{MARKER}={directory}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or belongs to somebody else
    return found


def end_processes(pids: Sequence[int], *, grace_seconds: float = STOP_SECONDS) -> None:
    """TERM, then KILL after the grace; return when all are gone."""
    _signal(pids, signal.SIGTERM)
    try:
        wait_until(lambda: not alive(pids), "processes end", timeout_seconds=grace_seconds)
    except ClusterError:
        _signal(pids, signal.SIGKILL)
        wait_until(lambda: not alive(pids), f"processes {alive(pids)} end after KILL", timeout_seconds=STOP_SECONDS)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def alive(pids: Sequence[int]) -> list[int]:
    """Those of the processes that still run; a zombie only waits for its parent."""
    alive = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            alive.append(pid)
    return alive
