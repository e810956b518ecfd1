"""What an exit code calls for: the table that the local supervisor and the operator share.

Invariant: pure, and the same under `grpo run` and on a cluster. Who restarts what, and with which budget, is the supervisor's side.
"""

from enum import StrEnum

from grpo_worker.errors import ExitCode

UNCOUNTED_LIMIT = 20  # restarts that do not count are bounded all the same
LONGEST_BACKOFF_SECONDS = 60.0

FINAL = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG, ExitCode.CHECKPOINT_DAMAGED})
_SIGNALLED = 128  # a shell's and the kubelet's code of a process that signal n ended is 128 + n; subprocess says -n


class Verdict(StrEnum):
    """What a process of a job wants by ending as it did."""

    DONE = "done"
    FAIL = "fail"  # a restart cannot mend it
    RESTART = "restart"  # charged to the budget
    RESTART_FREE = "restart, not counted"
    RESTART_ELSEWHERE = "restart on another node"  # charged as well
    YIELD = "yield"  # it was asked to stop, and has saved


def verdict(code: int) -> Verdict:
    """The contract of `grpo_worker.errors.ExitCode`; a code that is not in it is an unforeseen end."""
    if code in FINAL:
        return Verdict.FAIL
    return _VERDICTS.get(code, Verdict.RESTART)


_VERDICTS: dict[int, Verdict] = {
    ExitCode.DONE: Verdict.DONE,
    ExitCode.RETRY: Verdict.RESTART_FREE,
    ExitCode.YIELDED: Verdict.YIELD,
    ExitCode.DEVICE: Verdict.RESTART_ELSEWHERE,
}


def explanation_rank(code: int) -> int:
    """How well a process's end explains those of the others; smaller is better.

    Coordinator and trainers end within seconds of each other: whoever was killed comes before whoever lost a peer by it.
    """
    if code in FINAL:
        return 0
    if killed(code):
        return 1
    if code in (ExitCode.DONE, ExitCode.RETRY, ExitCode.YIELDED):
        return 5
    if code == ExitCode.PEER_LOST:
        return 4
    return 3 if code == ExitCode.DEVICE else 2  # NCCL reports a rank that crashed as its own failure


def killed(code: int) -> bool:
    """Whether a signal ended the process."""
    return code < 0 or code > _SIGNALLED


def backoff_seconds(first_seconds: float, restarts: int) -> float:
    """The wait before restart number `restarts` (from 1) without progress: doubling, bounded."""
    exponent = min(max(restarts, 1) - 1, 32)
    return float(min(first_seconds * 2**exponent, LONGEST_BACKOFF_SECONDS))
