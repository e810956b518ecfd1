"""What is done when a process of a job ends: a pure decision from exit codes.

Invariant: the local supervisor takes the same decisions as the operator (`grpo_worker.exit_policy` is their table). A rollout server is replaced alone; the coordinator and the
trainer hold one state and restart together, from the last checkpoint, while rollout servers stay warm; data and configuration errors
end the job at once, since a restart cannot mend them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from grpo_worker.exit_policy import UNCOUNTED_LIMIT, Verdict, backoff_seconds, explanation_rank, verdict

FREE = frozenset({Verdict.RESTART_FREE, Verdict.YIELD})


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
        return backoff_seconds(self.backoff_seconds, self.counted + self.uncounted)

    def progressed(self) -> None:
        self.counted = self.uncounted = 0


def decide(ended: Mapping[str, int]) -> Decision:
    """What follows from the exit codes of the processes that ended together, by name (`coordinator`, `trainer-0`, `rollout-1`).

    Negative codes are signals, as subprocess gives them.
    """
    verdicts = {name: verdict(code) for name, code in ended.items()}
    if verdicts.get("coordinator") in (Verdict.DONE, Verdict.YIELD):
        return Decision(Action.SUCCEED if verdicts["coordinator"] is Verdict.DONE else Action.YIELD, "coordinator")
    for name, wanted in verdicts.items():
        if wanted is Verdict.FAIL:
            return Decision(Action.FAIL, name)
    state_holders = {name: code for name, code in ended.items() if not name.startswith("rollout")}
    # A coordinator that lost its trainer (or the other way round) ends because of it: the other one's code tells why.
    culprit = min(state_holders or list(ended)[:1], key=lambda name: explanation_rank(ended[name]))
    action = Action.RESTART_SET if state_holders else Action.RESTART_ROLLOUT
    return Decision(action, culprit, counted=verdicts[culprit] not in FREE)
