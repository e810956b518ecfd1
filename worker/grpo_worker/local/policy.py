"""What is done when a process of a job ends: a pure decision from exit codes.

Invariant: the local supervisor takes the same decisions as the operator. A rollout server is replaced alone; the coordinator and the
trainer hold one state and restart together, from the last checkpoint, while rollout servers stay warm; data and configuration errors
end the job at once, since a restart cannot mend them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from grpo_worker.errors import ExitCode

FINAL = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG, ExitCode.CHECKPOINT_DAMAGED})
UNCOUNTED_LIMIT = 20  # restarts that do not count are bounded all the same
LONGEST_BACKOFF_SECONDS = 60.0


class Action(StrEnum):
    SUCCEED = "succeed"
    YIELD = "yield"
    FAIL = "fail"
    RESTART_ROLLOUT = "restart rollout"
    RESTART_SET = "restart coordinator and trainer"


@dataclass(frozen=True)
class Decision:
    """`counted`: the restart is charged to the budget. `culprit`: the process whose end explains it."""

    action: Action
    culprit: str
    counted: bool = True


@dataclass
class Budget:
    """Restarts since the last progress."""

    max_restarts: int
    backoff_seconds: float
    counted: int = 0
    uncounted: int = 0

    def charge(self, decision: Decision) -> float | None:
        """Seconds to wait before the restart; None when the budget is used up."""
        if decision.counted:
            self.counted += 1
        else:
            self.uncounted += 1
        if self.counted > self.max_restarts or self.uncounted > UNCOUNTED_LIMIT:
            return None
        exponent = self.counted + self.uncounted - 1
        return float(min(self.backoff_seconds * 2**exponent, LONGEST_BACKOFF_SECONDS))

    def progressed(self) -> None:
        self.counted = self.uncounted = 0


def decide(ended: Mapping[str, int]) -> Decision:
    """What follows from the exit codes of the processes that ended together, by name (`coordinator`, `trainer-0`, `rollout-1`).

    Negative codes are signals, as subprocess gives them.
    """
    if (code := ended.get("coordinator")) in (ExitCode.DONE, ExitCode.YIELDED):
        return Decision(Action.SUCCEED if code == ExitCode.DONE else Action.YIELD, "coordinator")
    for name, code in ended.items():
        if code in FINAL:
            return Decision(Action.FAIL, name)
    state_holders = {name: code for name, code in ended.items() if not name.startswith("rollout")}
    if not state_holders:
        name, code = next(iter(ended.items()))
        return Decision(Action.RESTART_ROLLOUT, name, counted=code != ExitCode.RETRY)
    # A coordinator that lost its trainer (or the other way round) ends with RETRY: the other one's code tells why.
    culprit = next(
        (name for name, code in state_holders.items() if code not in (ExitCode.RETRY, ExitCode.DONE)),
        next(iter(state_holders)),
    )
    return Decision(Action.RESTART_SET, culprit, counted=state_holders[culprit] != ExitCode.RETRY)
