"""From an exception of an operation to what a supervisor should do.

Invariant: each exception becomes one reason, one message that says what to do, and one exit code of the contract.
"""

from pathlib import Path

import torch.distributed as dist

from grpo_worker.errors import (
    CheckpointDamagedError,
    DeviceError,
    ExitCode,
    GRPOError,
    MemoryFullError,
    memory_was_full,
    one_line,
)
from grpo_worker.protocol.messages import ErrorReply


class OperationRefused(Exception):
    """Raised on all ranks at the same point: the trainer goes on."""

    def __init__(self, error: GRPOError) -> None:
        super().__init__(str(error))
        self.error = error


def remote_error(exception: BaseException, operation: str, rank: int) -> ErrorReply:
    """What the caller, and this process's supervisor, are told."""
    where = f"trainer rank {rank}, {operation}"
    said = root_cause(exception)
    if isinstance(exception, OperationRefused):
        cause = exception.error
        return ErrorReply(reason=cause.reason, message=str(cause), exit_code=int(cause.exit_code), recoverable=True)
    if isinstance(exception, GRPOError):
        return ErrorReply(reason=exception.reason, message=str(exception), exit_code=int(exception.exit_code))
    if memory_was_full(exception):
        message = (
            f"{where}: out of memory: {said} If it comes again, lower actor.ppoMaxTokenLenPerGPU (or ppoMicroBatchSizePerGPU), set "
            "model.enableGradientCheckpointing: true, offload with actor.fsdp.paramOffload and optimizerOffload, or lower "
            "rollout.gpuMemoryUtilization where an engine shares the device."
        )
        return ErrorReply(reason=MemoryFullError.reason, message=message, exit_code=int(MemoryFullError.exit_code))
    if isinstance(exception, dist.DistError) or "gloo" in said.lower() or "Connection closed by peer" in said:
        if "NCCL" in str(exception):
            return ErrorReply(reason=DeviceError.reason, message=f"{where}: {said}", exit_code=int(ExitCode.DEVICE))
        message = f"{where}: another rank is gone: {said}"
        return ErrorReply(reason="RankLost", message=message, exit_code=int(ExitCode.RETRY))
    if "CUDA error" in str(exception) or "NCCL" in str(exception):
        return ErrorReply(reason=DeviceError.reason, message=f"{where}: {said}", exit_code=int(ExitCode.DEVICE))
    message = f"{where}: {type(exception).__name__}: {said}"
    return ErrorReply(reason="InternalError", message=message, exit_code=int(ExitCode.INTERNAL))


def as_error(remote: ErrorReply) -> GRPOError:
    """The error that another rank had, to be raised here."""
    error = GRPOError(remote.message)
    error.reason, error.exit_code = remote.reason, ExitCode(remote.exit_code)
    return error


def damaged(directory: Path, exception: BaseException) -> CheckpointDamagedError:
    """What the ranks found in a checkpoint, those first that compared it with its manifest: to the others it is merely unreadable."""
    found = [error for _, error in _failures(exception)] or [exception]
    certain = [error for error in found if isinstance(error, CheckpointDamagedError)]
    text = "; ".join(dict.fromkeys(map(root_cause, certain or found)))
    return CheckpointDamagedError(text if text.startswith(str(directory)) else f"{directory}: {text}")


def root_cause(exception: BaseException) -> str:
    """In one line: DCP wraps each rank's exception, with its traceback, in its own."""
    for rank, inner in _failures(exception):
        return f"rank {rank}: {root_cause(inner)}"
    return one_line(exception)


def _failures(exception: BaseException) -> list[tuple[int, BaseException]]:
    """By rank, of an exception that DCP gathered."""
    failures = getattr(exception, "failures", None) or {}
    return [(rank, wrapped[0] if isinstance(wrapped, tuple) else wrapped) for rank, wrapped in sorted(failures.items())]
