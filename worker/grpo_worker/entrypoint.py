"""`grpo-worker coordinator|trainer|rollout|node --job FILE`: the command of each pod and of each local child process.

Invariant: the process ends with an exit code of the contract (`grpo_worker.errors.ExitCode`), and its last word, the termination
message, says why in one JSON object. Heavy imports happen in the role that needs them.
"""

import grpo_worker.first_process  # noqa: F401  before what takes time

# isort: split
import argparse
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_worker import logs
from grpo_worker.config import GRPOJob, load_written
from grpo_worker.environment import ATTEMPT, MEMBER_NAME, PARENT_PID, REPLICA_INDEX, TERMINATION_LOG
from grpo_worker.errors import DeviceError, ExitCode, GRPOError, MemoryFullError, memory_was_full, one_line

ROLES = ("coordinator", "trainer", "rollout", "node")
_PR_SET_PDEATHSIG = 1
MAX_LAST_WORD_BYTES = 4096  # what the kubelet keeps of a termination message
_MEMORY_REMEDY = (
    "If it comes again, give the machine or the pod more memory (runtime.resources), or ask for less: actor.ppoMaxTokenLenPerGPU and the "
    "offload of actor.fsdp on a trainer, rollout.gpuMemoryUtilization on an engine, reward.workers on the coordinator."
)

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process."""
    parser = argparse.ArgumentParser(prog="grpo-worker", description="One role of a GRPO job.")
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--job", required=True, help="the GRPOJob document (YAML)")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as end:  # argparse's own: 0 after --help, 2 for a wrong command line
        sys.exit(int(ExitCode.USAGE) if end.code == 2 else end.code)
    _die_with_parent()
    _end_on_sigterm()
    sys.exit(run(options.role, options.job))


def run(role: str, job_file: str) -> int:
    """Run one role to its end and return the exit code."""
    try:
        job = load_written(job_file)
        _set_up_logs(role, job)
        code, context = _run_role(role, job, job_file)
    except GRPOError as error:
        log.error("%s: %s", error.reason, error)
        _last_word(error.reason, str(error), error.context)
        return int(error.exit_code)
    except Exception as error:
        log.exception("%s failed", role)
        if memory_was_full(error):
            _last_word(MemoryFullError.reason, f"{role}: out of memory: {one_line(error)}. {_MEMORY_REMEDY}", {})
            return int(MemoryFullError.exit_code)
        _last_word("UnexpectedError", f"{type(error).__name__}: {error}", {})
        return int(ExitCode.INTERNAL)
    if code == ExitCode.DONE and role != "node":
        _last_word("Completed", "", context)
    return code


def _set_up_logs(role: str, job: GRPOJob) -> None:
    logs.set_up(
        job=job.name,
        namespace=job.metadata.namespace,
        role=role,
        member=os.environ.get(MEMBER_NAME, role),
        attempt=int(os.environ.get(ATTEMPT, "0")),
        rank=int(os.environ["RANK"]) if "RANK" in os.environ else None,
    )


def _die_with_parent() -> None:
    """A child of `grpo run` is killed by the kernel when the supervisor dies, however that happens."""
    parent = os.environ.get(PARENT_PID)
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(int(ExitCode.RETRY))  # it died before we asked
    del os.environ[PARENT_PID]  # our own children have other parents


def _end_on_sigterm() -> None:
    """Until the role has a handler of its own: the first process of a container ignores a signal that it does not handle, and would
    keep a pod that is to go for its whole grace period."""
    owner = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() == owner:
            _last_word("Terminated", "told to end while starting", {})
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _run_role(role: str, job: GRPOJob, job_file: str) -> tuple[int, dict[str, object]]:
    """The role's exit code, and what its last word tells besides; a trainer node with several ranks passes on the code of the first
    that failed."""
    if role == "coordinator":
        from grpo_worker.coordinator.main import run as run_coordinator

        return int(ExitCode.DONE), run_coordinator(job)
    if role == "node":  # its children ask for the device themselves
        from grpo_worker.local.node import run as run_node

        return run_node(job, job_file), {}
    _claim_device(job.spec.runtime.device)
    if role == "trainer":
        from grpo_worker.trainer.main import run as run_trainer

        return run_trainer(job), {}
    from grpo_worker.rollout.main import run as run_rollout

    run_rollout(job, index=int(os.environ.get(REPLICA_INDEX, "0")))
    return int(ExitCode.DONE), {}


def _claim_device(device: str) -> None:
    """Raises DeviceError where the document's device is not to be had: whoever places pods may find a node that has it."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for vLLM, which would take a GPU that it sees
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(
            "runtime.device: cuda, but torch finds no GPU: the node has no NVIDIA driver, or no GPU was given to this process "
            f"(CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}), or torch was built without CUDA "
            f"({torch.__version__})."
        )


def _last_word(reason: str, message: str, context: dict[str, object]) -> None:
    path = os.environ.get(TERMINATION_LOG)
    if not path:
        return
    message = message[:MAX_LAST_WORD_BYTES]
    while len(text := json.dumps({"reason": reason, "message": message, **context})) > MAX_LAST_WORD_BYTES and message:
        message = message[: len(message) * 9 // 10]  # escapes make it longer than its characters
    try:
        Path(path).write_text(text)
    except OSError as error:
        log.error("the termination message could not be written to %s: %s", path, error)


if __name__ == "__main__":
    main()
