"""`grpo run`: starts the processes of a job, keeps them alive, shows what happens, and ends when the job does.

Invariants: decisions are `policy.decide`'s; the supervisor holds no training state, so killing it loses nothing but the processes;
one run at a time in a run directory.
"""

import fcntl
import json
import os
import secrets
import signal
import time
from contextlib import ExitStack
from typing import Any

from grpo_worker.config import GRPOJob, written_document
from grpo_worker.config.cluster import cluster_only_fields
from grpo_worker.config.yaml_text import yaml_text
from grpo_worker.environment import (
    COORDINATOR_PORT,
    COORDINATOR_URL,
    DEVICE_COUNT,
    JOB_TOKEN,
    MEMBER_NAME,
    RESUME,
    RUN_DIRECTORY,
)
from grpo_worker.errors import (
    BY_EXIT_CODE,
    ConfigError,
    ExitCode,
    GRPOError,
    InternalError,
    StalledError,
    YieldedError,
    one_line,
)
from grpo_worker.local.child import KILL_SECONDS, Child, ChildSpec, code_text, end_all, wait_for
from grpo_worker.local.metrics import Server, serve_metrics
from grpo_worker.local.placement import Machine, Process, device_count, place
from grpo_worker.local.policy import Action, Budget, Decision, decide
from grpo_worker.local.status import ask_status
from grpo_worker.local.variables import document_variables
from grpo_worker.local.view import View
from grpo_worker.metric_loggers import EventLog, read_events
from grpo_worker.ports import free_port, require_free
from grpo_worker.run_directory import RunDirectory

POLL_SECONDS = 0.25
TOLD_TO_STOP_SECONDS = 30.0  # after a worker ended as told, for the coordinator to end too
TOLD_SECONDS = 5.0  # from the coordinator's word to the end of the others
END_SECONDS = 2.0
ENDED_BY_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM)


class Supervisor:
    """One `grpo run`."""

    def __init__(self, job: GRPOJob, directory: RunDirectory, view: View, metrics_port: int | None = None) -> None:
        self._job = job
        self._metrics_port = metrics_port
        self._spec = job.spec
        self._directory = directory
        self._view = view
        self._events = EventLog(directory.events, "supervisor", echo=False)
        self._offset = directory.events.stat().st_size if directory.events.exists() else 0
        self._token = secrets.token_urlsafe(32)
        self._children: dict[str, Child] = {}
        self._due: dict[str, float] = {}  # processes to start, by the time to do so
        budget = (self._spec.failure_policy.max_restarts, self._spec.failure_policy.backoff_seconds)
        self._budgets = {"set": Budget(*budget), "rollout": Budget(*budget)}
        self._status: dict[str, Any] | None = None
        self._best_step = -1
        self._last_progress = time.monotonic()
        self._interrupts = 0
        self._timed_out = False
        self._stop_deadline: float | None = None
        self._told_at: dict[str, float] = {}
        self._started = time.time()
        self._saved = False  # this run has a checkpoint of its own: a restart goes on from it

    def run(self) -> None:
        """Until the job has ended. Raises GRPOError when it did not succeed, YieldedError when it was stopped and has saved."""
        with ExitStack() as stack:
            stack.enter_context(self._exclusive())
            self._prepare()
            if self._metrics_port is not None:
                page = stack.enter_context(serve_metrics(self._metrics_port, self._job.name, self._servers))
                self._events.emit("info", "Metrics", f"Metrics of all processes: {page}")
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._interrupted))
            stack.callback(self._end_children)
            started = time.monotonic()
            self._due = dict.fromkeys(self._processes, started)
            while True:
                self._start_due()
                self._look()
                if decision := self._ended():
                    self._act(decision)
                    if decision.action in (Action.SUCCEED, Action.YIELD, Action.FAIL):
                        return self._conclude(decision)
                self._check_limits(started)
                time.sleep(POLL_SECONDS)

    def _prepare(self) -> None:
        network, root = self._spec.network, self._directory.root.resolve()
        for port, field in (
            (network.coordinator_port, "coordinatorPort"),
            (network.trainer_port, "trainerPort"),
            (network.weight_sync_port, "weightSyncPort"),
            (network.rendezvous_port, "rendezvousPort"),
        ):
            if port:
                require_free(port, field)
        for index in range(self._spec.engines if network.rollout_port else 0):
            require_free(network.rollout_port + index, "rolloutPort")
        port = network.coordinator_port or free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._directory.job.write_text(yaml_text(written_document(self._job)))
        self._common = {
            **document_variables(self._spec, os.environ),
            RUN_DIRECTORY: str(root),
            JOB_TOKEN: self._token,
            COORDINATOR_URL: self._url,
            COORDINATOR_PORT: str(port),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(network.rendezvous_port or free_port()),
        }
        machine = Machine.here()
        self._processes = {process.name: process for process in place(self._spec, machine)}
        self._common[DEVICE_COUNT] = str(device_count(self._spec, machine))
        self._directory.run_file.write_text(
            json.dumps({"name": self._job.name, "url": self._url, "pid": os.getpid(), "started": time.time()})
        )
        self._directory.run_file.chmod(0o600)
        if aside := cluster_only_fields(self._spec):
            self._events.emit("info", "LeftAside", f"Left aside, for a cluster only: {', '.join(aside)}")

    def _servers(self) -> list[Server]:
        """Processes that serve metrics now, as far as the coordinator has told."""
        members = (self._status or {}).get("members", ())
        told = [Server(member["role"], member["name"].rpartition("-")[2], member["url"]) for member in members]
        return [Server("coordinator", "0", self._url), *(server for server in told if server.url)]

    def _exclusive(self) -> Any:
        """The run directory's lock, held until the end. Raises ConfigError when another run has it."""
        file = self._directory.lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"{self._directory.root}: another run (process {owner}) is using this directory. Wait for it, stop it, or give --run-dir."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def _start_due(self) -> None:
        now = time.monotonic()
        for name in [name for name, due in self._due.items() if due <= now]:
            del self._due[name]
            self._children[name] = Child(self._child_spec(self._processes[name]))

    def _child_spec(self, process: Process) -> ChildSpec:
        logs = self._directory.logs
        environment = {**process.environment, **self._common, MEMBER_NAME: process.name}  # a person's own variables win
        if self._saved:
            environment[RESUME] = "auto"
        return ChildSpec(
            process.name,
            process.role,
            self._directory.job,
            logs / f"{process.name}.log",
            logs / f".{process.name}.termination",
            environment,
        )

    def _look(self) -> None:
        """Ask for /status, read new events, show both."""
        coordinator = self._children.get("coordinator")
        running = coordinator is not None and coordinator.code is None
        status = ask_status(self._url, self._token) if running else None
        self._status = status or self._status
        # A checkpoint that the run began with is not its own: the document may name it again.
        self._saved = self._saved or bool(
            status and status["checkpoint"] and status["checkpoint"]["time"] >= self._started
        )
        if status and status["step"] > self._best_step and status["state"] != "Starting":
            self._best_step = status["step"]
            self._last_progress = time.monotonic()
            for budget in self._budgets.values():
                budget.progressed()
        events, self._offset = read_events(self._directory.events, self._offset)
        self._view.update(status, events)

    def _ended(self) -> Decision | None:
        """The decision about children that ended; members of the set end together."""
        ended = self._ended_codes()
        if not ended:
            return None
        if any(not name.startswith("rollout") for name in ended):
            # Its partner notices within a heartbeat; waiting for its word tells the cause from the consequence.
            deadline = time.monotonic() + 2.0
            while time.monotonic() < deadline and any(child.code is None for name, child in self._set().items()):
                time.sleep(0.05)
            ended = self._ended_codes()
        return decide(ended)

    def _ended_codes(self) -> dict[str, int]:
        """Exit codes by name. A worker that ended with 0 was told to: the coordinator's own end follows and decides; when it does not
        follow, the worker was told by somebody else, and has to come back."""
        codes = {name: child.code for name, child in self._children.items() if child.code is not None}
        told = {name for name, code in codes.items() if code == ExitCode.DONE and name != "coordinator"}
        now = time.monotonic()
        self._told_at = {name: self._told_at.get(name, now) for name in told}
        waiting = {name for name, since in self._told_at.items() if now - since < TOLD_TO_STOP_SECONDS}
        return {name: ExitCode.RETRY if name in told else code for name, code in codes.items() if name not in waiting}

    def _act(self, decision: Decision) -> None:
        if decision.action not in (Action.RESTART_ROLLOUT, Action.RESTART_SET):
            return
        culprit = self._children[decision.culprit]
        reason, message = culprit.last_word()
        scope = "rollout" if decision.action is Action.RESTART_ROLLOUT else "set"
        budget = self._budgets[scope]
        wait = budget.charge(decision)
        if self._interrupts and decision.culprit == "coordinator" and culprit.code in ENDED_BY_SIGTERM:
            raise YieldedError("stopped while the coordinator was starting")  # later it has a handler, and saves
        # While the job stops, the step under way may still need its engines; without trainer and coordinator there is no step.
        if wait is None or (scope == "set" and (self._interrupts or self._timed_out)):
            raise self._failure(
                decision.culprit,
                f"after {self._spec.failure_policy.max_restarts} restarts without progress"
                if wait is None
                else "while stopping",
            )
        names = [decision.culprit] if scope == "rollout" else list(self._set())
        self._events.emit(
            "warning",
            reason,
            f"{decision.culprit} ended ({code_text(culprit.code)}): {one_line(message) or reason}. "
            f"Restarting {' and '.join(names)} in {wait:.0f} s",
        )
        for name in names:
            self._kill_child(self._children.pop(name))
            self._due[name] = time.monotonic() + wait
        self._last_progress = time.monotonic()

    def _set(self) -> dict[str, Child]:
        return {name: child for name, child in self._children.items() if not name.startswith("rollout")}

    def _conclude(self, decision: Decision) -> None:
        self._look()
        if decision.action is Action.FAIL:
            raise self._failure(decision.culprit, "")
        if self._timed_out and decision.action is Action.YIELD:
            raise ConfigError(
                f"activeDeadlineSeconds: the job ran longer than {self._spec.active_deadline_seconds} s. Its state is saved."
            )
        if decision.action is Action.YIELD:
            raise YieldedError(self._children["coordinator"].last_word()[1])

    def _failure(self, name: str, suffix: str) -> GRPOError:
        child = self._children[name]
        reason, message = child.last_word()
        error = BY_EXIT_CODE.get(child.code or 0, InternalError)(
            f"{name} failed{' ' + suffix if suffix else ''}: {message}\nIts log: {child.spec.log}"
        )
        error.reason = reason
        return error

    def _check_limits(self, started: float) -> None:
        deadline = self._spec.active_deadline_seconds
        if deadline is not None and not self._timed_out and time.monotonic() - started > deadline:
            self._timed_out = True
            self._events.emit(
                "error", "DeadlineExceeded", f"activeDeadlineSeconds: {deadline} s are over; saving and stopping"
            )
            self._stop_job()
        if self._stop_deadline is not None and time.monotonic() > self._stop_deadline:
            raise StalledError(
                f"the coordinator did not save and stop within {2 * self._spec.network.request_timeout_seconds:.0f} s. See {self._directory.logs}/coordinator.log"
            )
        if self._stop_deadline is not None:
            return  # what it waits for is bounded above
        limit = self._spec.failure_policy.stall_timeout_seconds
        if time.monotonic() - self._last_progress > limit + self._spec.failure_policy.startup_timeout_seconds * (
            self._best_step < 0
        ):
            decision = Decision(Action.RESTART_SET, "coordinator")
            if self._budgets["set"].charge(decision) is None:
                raise StalledError(
                    f"no step was finished within {limit:.0f} s (failurePolicy.stallTimeoutSeconds), also after restarts."
                )
            self._events.emit(
                "warning", "Stalled", f"no step was finished within {limit:.0f} s; restarting coordinator and trainer"
            )
            for name in list(self._set()):
                self._kill_child(self._children.pop(name))
                self._due[name] = time.monotonic()
            self._last_progress = time.monotonic()

    def _interrupted(self, number: int, frame: object) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._events.emit(
                "info", "Stopping", "stopping after this step, and saving; press Ctrl-C again to stop at once"
            )
            self._stop_job()
        else:
            raise KeyboardInterrupt

    def _stop_job(self) -> None:
        """Ask the coordinator to save and end; without one there is nothing to save."""
        coordinator = self._children.get("coordinator")
        if coordinator is None or coordinator.code is not None:
            raise YieldedError("stopped while nothing was running")
        coordinator.terminate()
        # The step under way is finished first: at most one operation of the trainer, and the save.
        self._stop_deadline = time.monotonic() + 2 * self._spec.network.request_timeout_seconds

    def _kill_child(self, child: Child) -> None:
        """Make room for its successor. A coordinator that was asked to stop would tell the engines, which are to stay, that the run is over."""
        child.kill()
        child.wait(KILL_SECONDS)

    def _end_children(self) -> None:
        coordinator = self._children.get("coordinator")
        if coordinator is not None and coordinator.code in (ExitCode.DONE, ExitCode.YIELDED):
            wait_for(self._children.values(), TOLD_SECONDS)  # it has told them to end
        # Short: nothing is left to save, and a trainer that hears no coordinator would wait for one.
        end_all(list(self._children.values()), END_SECONDS)
