"""Errors that reach a person, each with the exit code and reason that a supervisor acts on.

Invariant: every process of a job ends with 0 or with one of `ExitCode`, and its last word (the termination message) carries
the same `reason` and `message`. The local supervisor and the operator decide from these alone.
"""

import re
from enum import IntEnum

MAX_LINE_CHARACTERS = 600


def one_line(error: BaseException | str) -> str:
    """What an error says, in one line that fits into a sentence: all of its lines, without the C++ stack that torch appends.

    Never nothing: an error without words is its type. Of a very long text both ends stay.
    """
    text = " ".join(str(error).partition("Exception raised from ")[0].split())
    if isinstance(error, KeyError) or not text:
        text = ": ".join(filter(None, (type(error).__name__, text))) if isinstance(error, BaseException) else text
    if len(text) > MAX_LINE_CHARACTERS:
        text = f"{text[: MAX_LINE_CHARACTERS * 2 // 3]} … {text[-MAX_LINE_CHARACTERS // 3 :]}"
    return text


_MEMORY_FULL = re.compile(
    r"out of memory|can(no|')t allocate memory|not enough memory|ALLOC_FAILED|No available memory|less than desired GPU memory",
    re.IGNORECASE,
)


def memory_was_full(error: BaseException | str) -> bool:
    """Whether an exception, or what a library said, is about memory that was not there: of a device or of the host."""
    return isinstance(error, MemoryError) or _MEMORY_FULL.search(str(error)) is not None


class ExitCode(IntEnum):
    """What a supervisor does next, by process exit code (the numbers follow sysexits.h up to 78)."""

    DONE = 0
    USAGE = 64  # fail now: the command line or the document is wrong
    DATA = 65  # fail now: the data, the model or the reward function is wrong
    INTERNAL = 70  # start again, counted: something that nobody foresaw
    RETRY = 75  # start again, not counted against the budget
    CONFIG = 78  # fail now: the configuration cannot work on this machine
    YIELDED = 80  # stopped on request after saving
    CHECKPOINT_DAMAGED = 81  # no checkpoint that resume may use
    PEER_LOST = 82  # a weight-sync peer died or did not answer in time
    STALLED = 83  # no progress within the limit
    MEMORY = 84  # start again, counted: a device or the host had no memory left, which may be another's doing
    DEVICE = 85  # GPU or NCCL hardware: start again elsewhere


class GRPOError(Exception):
    """Base of all errors meant for a person. `str(error)` says what was wrong, where, and what to do."""

    exit_code: ExitCode = ExitCode.CONFIG
    reason: str = "Error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.context: dict[str, object] = {}  # further fields of the termination message: step, checkpoint


class UsageError(GRPOError):
    """The command line or the GRPOJob document is wrong."""

    exit_code = ExitCode.USAGE
    reason = "InvalidUsage"


class DataError(GRPOError):
    """A data file, a model directory or a user's function is wrong."""

    exit_code = ExitCode.DATA
    reason = "InvalidData"


class ConfigError(GRPOError):
    """The job is valid but cannot run here: a port in use, no memory, no space, no permission."""

    exit_code = ExitCode.CONFIG
    reason = "InvalidConfiguration"


class InternalError(GRPOError):
    """A process died in a way that nobody foresaw."""

    exit_code = ExitCode.INTERNAL
    reason = "InternalError"


class RetryableError(GRPOError):
    """Something outside the job failed for now."""

    exit_code = ExitCode.RETRY
    reason = "TryAgain"


class YieldedError(GRPOError):
    """The run was asked to stop and has saved its state."""

    exit_code = ExitCode.YIELDED
    reason = "Yielded"


class CheckpointDamagedError(GRPOError):
    """A checkpoint does not match its manifest."""

    exit_code = ExitCode.CHECKPOINT_DAMAGED
    reason = "CheckpointDamaged"


class PeerLostError(GRPOError):
    """A peer of the weight sync died or did not answer within its limit."""

    exit_code = ExitCode.PEER_LOST
    reason = "PeerLost"


class StalledError(GRPOError):
    """No step was finished within the limit."""

    exit_code = ExitCode.STALLED
    reason = "Stalled"


class MemoryFullError(GRPOError):
    """A device or the host had no memory left."""

    exit_code = ExitCode.MEMORY
    reason = "OutOfMemory"


class DeviceError(GRPOError):
    """The GPU or NCCL failed."""

    exit_code = ExitCode.DEVICE
    reason = "DeviceFailed"


BY_EXIT_CODE: dict[int, type[GRPOError]] = {kind.exit_code: kind for kind in GRPOError.__subclasses__()}
