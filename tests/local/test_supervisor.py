"""`grpo run` keeps the processes of a job alive, tells why one ended, and ends when the job does.

The supervisor is the real one; its children are small programs that end as a test tells them to (`fake_role.py`), since the roles
themselves take half a minute to start. The last test runs the roles themselves.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_worker.config import GRPOJob, job_from_document
from grpo_worker.errors import (
    ConfigError,
    DataError,
    DeviceError,
    ExitCode,
    GRPOError,
    InternalError,
    MemoryFullError,
    YieldedError,
)
from grpo_worker.local import child, supervisor
from grpo_worker.local.supervisor import Supervisor
from grpo_worker.metric_loggers.events import Event
from grpo_worker.run_directory import RunDirectory

FAKE_ROLE = Path(__file__).parent / "fake_role.py"


class RecordingView:
    """What a person would have been shown."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.steps: list[int] = []

    def update(self, status: Mapping[str, Any] | None, events: Sequence[Event]) -> None:
        self.events += events
        if status:
            self.steps.append(status["step"])

    def close(self) -> None:
        return

    def reasons(self) -> list[str]:
        return [event["reason"] for event in self.events]


@pytest.fixture(autouse=True)
def small_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "command", lambda spec: [sys.executable, str(FAKE_ROLE), spec.role])
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.02)


def job(**sections: Any) -> GRPOJob:
    return job_from_document(
        {
            "apiVersion": "grpo.dev/v1alpha1",
            "kind": "GRPOJob",
            "metadata": {"name": "job"},
            "spec": {
                "model": {"path": "m"},
                "data": {"trainFiles": ["t.parquet"]},
                "reward": {"function": "gsm8k"},
                "failurePolicy": {"maxRestarts": 2, "backoffSeconds": 0.0},
                **sections,
            },
        }
    )


class Run:
    """One run directory, and what happened in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = RunDirectory(root)
        self.view = RecordingView()

    def ends(self, name: str, *directives: dict[str, Any]) -> None:
        """How the starts of a process end, in order."""
        (self.root / f"{name}.ends").write_text("\n".join(json.dumps(directive) for directive in directives))

    def finish(self) -> None:
        (self.root / "finish").touch()

    def step(self, number: int) -> None:
        (self.root / "step.tmp").write_text(str(number))
        os.replace(self.root / "step.tmp", self.root / "step")

    def starts(self, name: str) -> list[dict[str, Any]]:
        file = self.root / "starts.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        starts = [json.loads(line) for line in lines if line.endswith("\n")]
        return [start for start in starts if start["name"] == name]

    def counts(self) -> dict[str, int]:
        return {name: len(self.starts(name)) for name in ("coordinator", "trainer-0", "rollout-0")}

    def go(self, a_job: GRPOJob | None = None) -> None:
        Supervisor(a_job or job(), self.directory, self.view).run()

    @contextmanager
    def meanwhile(self, *steps: Callable[[], Any]) -> Iterator[None]:
        """Beside the supervisor (which needs the main thread for its signals): conditions to wait for and things to do."""
        errors: list[BaseException] = []

        def work() -> None:
            try:
                for step in steps:
                    step()
            except BaseException as error:
                errors.append(error)
                self.finish()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            thread.join(15)
            if errors:
                raise errors[0]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def until(condition: Callable[[], Any], seconds: float = 12.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_ends_when_the_coordinator_is_done(run: Run) -> None:
    with run.meanwhile(lambda: until(lambda: run.view.steps), run.finish):
        run.go()
    assert run.counts() == {"coordinator": 1, "trainer-0": 1, "rollout-0": 1}
    assert run.view.steps[0] == 1
    pids = [start["pid"] for name in run.counts() for start in run.starts(name)]
    until(lambda: not any(alive(pid) for pid in pids), 10)


def test_children_get_what_they_need_and_the_document_with_every_value(run: Run) -> None:
    run.finish()
    run.go(job(runtime={"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}))
    (rollout,), (coordinator,) = run.starts("rollout-0"), run.starts("coordinator")
    environment = rollout["environment"]
    assert environment["GRPO_RUN_DIR"] == str(run.root)
    assert environment["GRPO_MEMBER_NAME"] == "rollout-0"
    assert environment["GRPO_REPLICA_INDEX"] == "0"
    assert environment["NCCL_DEBUG"] == "INFO"
    assert environment["GRPO_COORDINATOR_URL"].endswith(coordinator["environment"]["GRPO_COORDINATOR_PORT"])
    assert len(environment["GRPO_JOB_TOKEN"]) >= 32
    assert yaml.safe_load(run.directory.job.read_text())["spec"]["rollout"]["n"] == 5
    assert environment["GRPO_JOB_TOKEN"] not in run.directory.job.read_text() + run.directory.run_file.read_text()
    assert (run.directory.run_file.stat().st_mode & 0o777) == 0o600
    assert (run.directory.logs / "rollout-0.log").read_text() == "rollout-0 runs as rollout\n"


def test_secrets_reach_the_children_and_no_file_of_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "sesame-2")
    reference = {"secretKeyRef": {"name": "s", "key": "k"}}
    env = [{"name": "IN_DOCUMENT", "value": "sesame-1"}, {"name": "FROM_SHELL", "valueFrom": reference}]
    run.finish()
    run.go(job(runtime={"env": env}))
    (start,) = run.starts("trainer-0")
    assert (start["environment"]["IN_DOCUMENT"], start["environment"]["FROM_SHELL"]) == ("sesame-1", "sesame-2")
    record = run.root / "starts.jsonl"  # this test's own
    written = [path for path in run.root.rglob("*") if path.is_file() and path != record]
    assert run.directory.job in written and "IN_DOCUMENT" in run.directory.job.read_text()
    assert [path for path in written if b"sesame" in path.read_bytes()] == []
    assert "LeftAside" not in run.view.reasons()


def test_what_only_a_cluster_uses_is_left_aside_in_one_line(run: Run) -> None:
    run.finish()
    run.go(job(runtime={"workspace": {"claimName": "a"}}, scheduling={"nodeSelector": {"a": "b"}}))
    (told,) = [event["message"] for event in run.view.events if event["reason"] == "LeftAside"]
    assert told == "Left aside, for a cluster only: runtime.workspace, scheduling.nodeSelector"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_engine_killed_by_a_signal_is_replaced_alone(run: Run, number: int) -> None:
    run.ends("rollout-0", {"signal": number})
    with run.meanwhile(lambda: until(lambda: len(run.starts("rollout-0")) == 2), run.finish):
        run.go()
    assert run.counts() == {"coordinator": 1, "trainer-0": 1, "rollout-0": 2}
    (event,) = [event for event in run.view.events if event["level"] == "warning"]
    assert f"rollout-0 ended (signal {signal.Signals(number).name})" in event["message"]
    assert "Restarting rollout-0 in 0 s" in event["message"]


def test_an_engine_killed_from_outside_is_replaced(run: Run) -> None:
    def kill() -> None:
        until(lambda: run.view.steps and run.starts("rollout-0"))
        os.kill(run.starts("rollout-0")[0]["pid"], signal.SIGKILL)

    with run.meanwhile(kill, lambda: until(lambda: len(run.starts("rollout-0")) == 2), run.finish):
        run.go()
    assert run.counts()["trainer-0"] == 1


@pytest.mark.parametrize("name", ["trainer-0", "coordinator"])
def test_coordinator_and_trainer_restart_together_and_engines_stay(run: Run, name: str) -> None:
    run.ends(name, {"signal": 9})
    with run.meanwhile(lambda: until(lambda: len(run.starts("trainer-0")) == len(run.starts("coordinator")) == 2), run.finish):  # fmt: skip
        run.go()
    assert run.counts() == {"coordinator": 2, "trainer-0": 2, "rollout-0": 1}
    warnings = [event["message"] for event in run.view.events if event["level"] == "warning"]
    assert any(f"{name} ended" in message and "coordinator and trainer-0" in message for message in warnings)


@pytest.mark.parametrize("name", ["trainer-0", "rollout-0"])
def test_restarts_without_progress_are_bounded(run: Run, name: str) -> None:
    run.ends(name, *[{"code": 85, "reason": "DeviceFailed", "message": "ECC error on GPU 0"}] * 9)
    (run.root / "step").write_text("0")
    with pytest.raises(DeviceError, match=r"after 2 restarts without progress: ECC error on GPU 0") as caught:
        run.go()
    assert caught.value.reason == "DeviceFailed"
    assert len(run.starts(name)) == 3


def test_memory_that_was_full_is_tried_again_and_final_when_it_repeats(run: Run) -> None:
    end = {
        "code": 84,
        "reason": "OutOfMemory",
        "message": "out of memory: tried 2 GiB. Lower actor.ppoMaxTokenLenPerGPU",
    }
    run.ends("trainer-0", *[end] * 9)
    (run.root / "step").write_text("0")
    with pytest.raises(
        MemoryFullError, match=r"trainer-0 failed after 2 restarts .* Lower actor.ppoMaxTokenLenPerGPU"
    ) as caught:
        run.go()
    assert (caught.value.exit_code, caught.value.reason) == (84, "OutOfMemory")
    assert len(run.starts("trainer-0")) == 3
    warnings = [event["message"] for event in run.view.events if event["level"] == "warning"]
    assert len(warnings) >= 2 and all("Lower actor.ppoMaxTokenLenPerGPU" in warning for warning in warnings)


def test_progress_gives_the_restarts_back(run: Run) -> None:
    run.ends("rollout-0", *[{"signal": 9}] * 2)

    def again() -> None:
        for step in (1, 2, 3):
            until(lambda starts=1 + 2 * step: len(run.starts("rollout-0")) == starts)
            run.step(step + 1)
            until(lambda shown=step + 1: run.view.steps[-1] == shown)
            if step < 3:
                run.ends("rollout-0", {"signal": 9})
                os.kill(run.starts("rollout-0")[-1]["pid"], signal.SIGKILL)

    with run.meanwhile(again, run.finish):
        run.go()


@pytest.mark.parametrize(("code", "kind"), [(65, DataError), (78, ConfigError), (64, GRPOError), (81, GRPOError)])
@pytest.mark.parametrize("name", ["coordinator", "trainer-0", "rollout-0"])
def test_what_no_restart_mends_ends_the_run_at_once(run: Run, name: str, code: int, kind: type[GRPOError]) -> None:
    run.ends(name, {"code": code, "reason": "InvalidData", "message": "model.path: /nowhere does not exist"})
    started = time.monotonic()
    with pytest.raises(kind, match=rf"{name} failed: model\.path: /nowhere does not exist") as caught:
        run.go()
    assert time.monotonic() - started < 30
    assert caught.value.exit_code == code
    assert caught.value.reason == "InvalidData"
    assert str(run.directory.logs / f"{name}.log") in str(caught.value)
    assert len(run.starts(name)) == 1


def test_a_process_without_a_last_word_is_told_by_the_end_of_its_log(run: Run) -> None:
    run.ends("trainer-0", *[{"code": 1}] * 9)
    (run.root / "step").write_text("0")
    with pytest.raises(InternalError, match=r"(?s)trainer-0 failed.*ended with exit code 1.*trainer-0 runs as trainer"):
        run.go()


def test_a_run_directory_takes_one_run_at_a_time(run: Run) -> None:
    second = Run(run.root)

    def try_a_second() -> None:
        until(lambda: run.view.steps)
        with pytest.raises(ConfigError, match=rf"another run \(process {os.getpid()}\) is using this directory"):
            Supervisor(job(), second.directory, second.view).run()

    with run.meanwhile(try_a_second, run.finish):
        run.go()
    (run.root / "starts.jsonl").unlink()
    run.go()  # the lock ends with the run


def test_a_second_run_in_another_process_is_refused_by_the_process_id(run: Run, tmp_path: Path) -> None:
    document = tmp_path / "job.yaml.in"
    document.write_text(yaml.safe_dump(job().model_dump(by_alias=True, mode="json", exclude_none=True)))
    results: list[subprocess.CompletedProcess[str]] = []

    def try_a_second() -> None:
        until(lambda: run.view.steps)
        command = [sys.executable, "-m", "grpo_worker.cli.main", "run", str(document), "--run-dir", str(run.root)]
        results.append(subprocess.run(command, capture_output=True, text=True, timeout=60, check=False))

    with run.meanwhile(try_a_second, run.finish):
        run.go()
    (result,) = results
    assert result.returncode == ExitCode.CONFIG
    assert f"another run (process {os.getpid()})" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("field", ["coordinatorPort", "trainerPort", "weightSyncPort", "rolloutPort", "rendezvousPort"])
def test_a_port_in_use_names_its_field(run: Run, field: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"network\.{field}: port {port} is in use"):
            run.go(job(network={field: port}))
    assert run.counts()["coordinator"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(run: Run, number: int) -> None:
    with (
        run.meanwhile(lambda: until(lambda: run.view.steps), lambda: os.kill(os.getpid(), number)),
        pytest.raises(YieldedError, match="stopped after step 1 of 9"),
    ):
        run.go()
    assert "Stopping" in run.view.reasons()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_coordinator_that_is_stopped_while_it_starts_has_nothing_to_save(run: Run) -> None:
    run.ends("coordinator", {"when_told": 143})
    with (
        run.meanwhile(lambda: until(lambda: run.view.steps), lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(YieldedError, match="stopped while the coordinator was starting"),
    ):
        run.go()


def test_a_job_over_its_deadline_is_saved_and_fails(run: Run) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"activeDeadlineSeconds: the job ran longer than 1 s\. Its state is saved"):
        run.go(job(activeDeadlineSeconds=1))
    assert 1 <= time.monotonic() - started < 30
    assert "DeadlineExceeded" in run.view.reasons()


def test_a_job_that_stands_still_is_restarted_and_then_given_up(run: Run) -> None:
    policy = {"maxRestarts": 1, "backoffSeconds": 0.0, "stallTimeoutSeconds": 3.0, "startupTimeoutSeconds": 60.0}
    with pytest.raises(
        GRPOError, match=r"no step was finished within 3 s \(failurePolicy\.stallTimeoutSeconds\)"
    ) as caught:
        run.go(job(failurePolicy=policy))
    assert caught.value.exit_code is ExitCode.STALLED
    assert run.counts() == {"coordinator": 2, "trainer-0": 2, "rollout-0": 1}


def test_the_roles_themselves_name_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {"name": "job"},
        "spec": {
            "model": {"path": "nowhere/model"},
            "data": {"trainFiles": ["t.parquet"], "trainBatchSize": 4},
            "reward": {"function": "gsm8k"},
            "actor": {"ppoMiniBatchSize": 4},
            "runtime": {"device": "cpu"},
        },
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "grpo_worker.cli.main", "run", "job.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == ExitCode.DATA
    assert "model.path" in done.stderr
    assert "nowhere/model" in done.stderr
    assert "Traceback" not in done.stderr
