"""`grpo-worker node`: the container of a colocated node, with the trainer's part of it and the engines that have the same devices in turn.

Invariant: the container ends with its trainer, by the trainer's exit code and last word. An engine that dies is started again here, within
`failurePolicy`'s budget; one that no restart mends ends the container with the engine's own word. Who is told to end tells the trainer,
which may still have to save with the engines' help; engines end behind it.
"""

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from grpo_worker.config import GRPOJob
from grpo_worker.environment import COORDINATOR_URL, MEMBER_NAME, ROLLOUT_PORT, TERMINATION_LOG
from grpo_worker.errors import ExitCode, one_line
from grpo_worker.local.child import Child, ChildSpec, code_text, end_all
from grpo_worker.local.placement import Machine, Process, place_node
from grpo_worker.local.policy import Action, Budget, decide
from grpo_worker.local.status import ask_status
from grpo_worker.metric_loggers import EventLog
from grpo_worker.protocol.auth import job_token
from grpo_worker.run_directory import RunDirectory

POLL_SECONDS = 0.25
STATUS_SECONDS = 5.0
END_GRACE_SECONDS = 10.0
TOLD_TO_STOP_SECONDS = 30.0  # after an engine ended as told, for the trainer to end too


def run(job: GRPOJob, job_file: str) -> int:
    """Until the trainer has ended, or an engine that cannot be started again. Returns the exit code. Raises ConfigError."""
    environment = os.environ
    processes = place_node(
        job.spec, Machine.here(), int(environment.get("NODE_RANK", "0")), int(environment.get(ROLLOUT_PORT, "0"))
    )
    with tempfile.TemporaryDirectory(prefix="grpo-node-") as folder:
        return Node(job, Path(job_file), processes, Path(folder)).run()


class Node:
    """The processes of one container."""

    def __init__(self, job: GRPOJob, job_file: Path, processes: list[Process], folder: Path) -> None:
        policy = job.spec.failure_policy
        self._job_file, self._folder = job_file, folder
        self._trainer, *engines = processes
        self._engines = {process.name: process for process in engines}
        self._budget = Budget(policy.max_restarts, policy.backoff_seconds)
        self._events = EventLog(RunDirectory.of_environment(job.name).events, self._trainer.name)
        self._children: dict[str, Child] = {}
        self._due: dict[str, float] = {}
        self._told_at: dict[str, float] = {}
        self._best_step, self._asked = -1, 0.0

    def run(self) -> int:
        trainer = self._start(self._trainer)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: trainer.terminate())
        self._due = dict.fromkeys(self._engines, 0.0)
        try:
            while (code := trainer.code) is None:
                for name in [name for name, due in self._due.items() if due <= time.monotonic()]:
                    del self._due[name]
                    self._children[name] = self._start(self._engines[name])
                self._look()
                for name, child in list(self._children.items()):
                    if (ended := self._ended(name, child)) is not None and (code := self._replace(name, child, ended)):
                        return code
                time.sleep(POLL_SECONDS)
            self._last_word(trainer)
            return 128 - code if code < 0 else code
        finally:
            end_all([*self._children.values(), trainer], END_GRACE_SECONDS)

    def _start(self, process: Process) -> Child:
        kept = {
            name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ
        }  # of whom knows the pod's cores
        environment = {**process.environment, **kept, MEMBER_NAME: process.name}
        return Child(
            ChildSpec(process.name, process.role, self._job_file, None, self._folder / process.name, environment)
        )

    def _look(self) -> None:
        """A new highest step gives the budget back."""
        if not (url := os.environ.get(COORDINATOR_URL)) or time.monotonic() - self._asked < STATUS_SECONDS:
            return
        self._asked = time.monotonic()
        status = ask_status(url, job_token()) if self._budget.counted or self._budget.uncounted else None
        if status and status["state"] != "Starting" and status["step"] > self._best_step:
            self._best_step = status["step"]
            self._budget.progressed()

    def _ended(self, name: str, child: Child) -> int | None:
        """The code to judge. One that ended with 0 was told to by the coordinator, as the trainer then is too; or by somebody else."""
        code = child.code
        if code != ExitCode.DONE:
            return code
        since = self._told_at.setdefault(name, time.monotonic())
        return ExitCode.RETRY if time.monotonic() - since > TOLD_TO_STOP_SECONDS else None

    def _replace(self, name: str, child: Child, code: int) -> int:
        """Start an engine again; the container's exit code when that is not to be."""
        decision = decide({name: code})
        wait = None if decision.action is Action.FAIL else self._budget.charge(decision)
        reason, message = child.last_word()
        if wait is None:
            self._events.emit(
                "error", reason, f"{name} ended ({code_text(code)}): {one_line(message)}. It is not started again."
            )
            self._last_word(child)
            return 128 - code if code < 0 else code
        self._events.emit(
            "warning",
            reason,
            f"{name} ended ({code_text(code)}): {one_line(message) or reason}. Restarting it in {wait:.0f} s",
        )
        child.kill()  # what it left behind still has the device's memory
        self._told_at.pop(name, None)
        del self._children[name]
        self._due[name] = time.monotonic() + wait
        return 0

    def _last_word(self, child: Child) -> None:
        """Becomes the container's."""
        if TERMINATION_LOG in os.environ and child.spec.termination.exists():
            shutil.copyfile(child.spec.termination, os.environ[TERMINATION_LOG])
