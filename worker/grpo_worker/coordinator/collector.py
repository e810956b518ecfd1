"""From prompts to the groups of the next step: what is admitted goes out to the engines, what comes back is scored, and a batch is handed
over whole.

Invariants:
- maxStaleness 0: a step's prompts are generated with the weights of the step before, by idle engines, in requests whose results do not
  depend on timing; so the run is a function of the document and the data.
- maxStaleness 1 and more: the engines are kept busy while the trainer updates; `Schedule` bounds how far they run ahead.
"""

import asyncio
import time

from grpo_worker.config import Spec
from grpo_worker.coordinator.dispatch import DispatchOptions
from grpo_worker.coordinator.groups import Group, GroupState
from grpo_worker.coordinator.halt import Halt
from grpo_worker.coordinator.members import Emit
from grpo_worker.coordinator.schedule import Batch, Schedule
from grpo_worker.coordinator.scoring import Scorer
from grpo_worker.coordinator.timing import Timer
from grpo_worker.coordinator.validation import MakeDispatcher
from grpo_worker.errors import StalledError

# Of failurePolicy.stallTimeoutSeconds: a supervisor restarts the job after all of it, and what was learned has to be saved before.
STALL_SHARE = 0.8


class Collector:
    """Its `dispatcher` runs beside the training."""

    def __init__(
        self,
        spec: Spec,
        schedule: Schedule,
        make_dispatcher: MakeDispatcher,
        options: DispatchOptions,
        scorer: Scorer,
        emit: Emit,
        halt: Halt,
    ) -> None:
        self.dispatcher = make_dispatcher(options, self._on_generated)
        self._schedule = schedule
        self._scorer = scorer
        self._emit = emit
        self._halt = halt
        self._samples = spec.rollout.n
        self._overlapped = spec.rollout.max_staleness > 0
        self._stall_seconds = STALL_SHARE * spec.failure_policy.stall_timeout_seconds
        self._replaced = 0  # groups admitted in the place of filtered and failed ones since the last step
        self._group_ended = asyncio.Event()
        self._generated_at = time.monotonic()
        halt.wakes(self._group_ended)

    async def next_batch(self, timer: Timer) -> Batch | None:
        """The next step's groups, of which none may be ready to train on; None on a stop request.

        Raises StalledError, and what failed in scoring or beside the training.
        """
        waited = time.monotonic()
        while True:
            self._group_ended.clear()
            self._scorer.raise_failure()
            self._halt.raise_failure()
            if self._halt.reason:
                return None
            if stale := self._schedule.reject_stale():
                self._emit(
                    "warning",
                    "StaleSamples",
                    f"{len(stale)} groups were older than rollout.maxStaleness and are generated again",
                )
                self.dispatcher.submit(stale, atomic=False)
            self._feed()
            if self._schedule.available():
                if self._replaced:
                    self._tell(self._replaced, "more, in place of filtered and failed ones: ")
                    self._replaced = 0
                arrived = time.monotonic()
                timer.seconds["gen"] = max(min(self._generated_at, arrived) - waited, 0.0)
                timer.seconds["reward"] = arrived - waited - timer.seconds["gen"]
                return self._schedule.take()
            if time.monotonic() > waited + self._stall_seconds:
                waiting = [group.uid for group in self._schedule.window if not group.done]
                raise StalledError(
                    f"step {self._schedule.version + 1}: {len(waiting)} prompts did not come back within {self._stall_seconds:.0f} s, "
                    f"{STALL_SHARE:.0%} of failurePolicy.stallTimeoutSeconds, the first: {', '.join(waiting[:5])}"
                )
            try:
                async with asyncio.timeout(1.0):
                    await self._group_ended.wait()
            except TimeoutError:
                continue

    def trained(self, version: int) -> None:
        """The engines serve `version`: its room is for new prompts."""
        self._schedule.trained(version)
        if self._overlapped:
            self._feed()

    def _feed(self, *, replacing: bool = False) -> None:
        """Admit what the schedule allows and send it out. `replacing`: one by one, so that is told once a step."""
        if self._halt.called:
            return
        if admitted := self._schedule.admit():
            if replacing:
                self._replaced += len(admitted)
            else:
                self._tell(len(admitted))
            self.dispatcher.submit(admitted, atomic=not self._overlapped)

    def _tell(self, prompts: int, how: str = "") -> None:
        trajectories = prompts * self._samples
        self._emit(
            "info",
            "Rollout",
            f"Rollout: generating {how}{prompts} prompts x {self._samples} samples = {trajectories} trajectories",
        )

    def _on_generated(self, group: Group) -> None:
        """A group came back from an engine, or failed."""
        self._generated_at = time.monotonic()
        if group.state is GroupState.FAILED:
            self._on_ended(group)
        else:
            self._scorer.submit(group, self._on_ended)

    def _on_ended(self, group: Group) -> None:
        self._group_ended.set()
        if self._overlapped:
            self._feed(replacing=True)
