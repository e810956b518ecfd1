"""Which prompts may be generated now, and which groups the next step trains on.

Invariants:
- Staleness is bounded at admission: with weights of version v, at most (maxStaleness + v + 1) * B groups have been admitted since
  version 0 (those that came to nothing do not count), so a group admitted under version v is trained at version v + maxStaleness
  or before (AReaL, arXiv 2505.24298, section 5.1).
- Groups are consumed in the order of admission. So the first unconsumed group is the data frontier: everything before it has ended,
  nothing after it was trained on, and one cursor resumes the run without losing, repeating, or favouring short prompts.
- How many steps are left follows from how many prompts are left, at any time: a resumed run plans as the unbroken one does, whatever the
  batch size was before.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from grpo_worker.coordinator.groups import Group, GroupState
from grpo_worker.data.dataset import Prompt
from grpo_worker.data.order import Cursor


@dataclass(frozen=True)
class Batch:
    """What one step consumes: the groups to train on, and those that came to nothing on the way."""

    ready: list[Group]
    filtered: list[Group]
    failed: list[Group]


class Schedule:
    """The window of groups between the data and the trainer. Pure bookkeeping: no clock, no I/O."""

    def __init__(
        self,
        prompts: Iterator[Prompt],
        start: Cursor,
        *,
        batch_size: int,
        max_staleness: int,
        max_gen_batches: int,
        version: int,
        prompts_left: int,
        last_version: int | None = None,
    ) -> None:
        """
        Args:
            prompts: the data from `start` on.
            batch_size: B, groups a step.
            max_gen_batches: bound of dynamic sampling, in batches of B admitted for one step.
            version: of the weights at the start (steps already trained).
            prompts_left: how many `prompts` has.
            last_version: of the weights that end the run even if prompts are left; None: the prompts decide.
        """
        self._prompts = prompts
        self._batch_size = batch_size
        self._max_staleness = max_staleness
        self._max_gen_batches = max_gen_batches
        self._window: deque[Group] = deque()
        self._frontier = start
        self.version = version  # of the weights that serve
        self._consumed = 0  # groups trained on since the start
        self._start_version = version
        self._admitted = 0
        self.prompts_left = prompts_left  # not consumed
        self._steps = version  # the one that is being trained included
        self._limit = last_version
        self._exhausted = False

    @property
    def last_version(self) -> int:
        """Of the weights that end the run; nothing is generated for a step beyond. The last prompts, too few for a batch, are left out."""
        planned = self._steps + self.prompts_left // self._batch_size
        return planned if self._limit is None else max(min(planned, self._limit), self.version)

    @property
    def window(self) -> tuple[Group, ...]:
        """Admitted and not consumed, in order."""
        return tuple(self._window)

    @property
    def frontier(self) -> Cursor:
        """Where the data goes on after a restart: the first prompt that has not ended."""
        return self._frontier

    def capacity(self) -> int:
        """How many more groups may be admitted now."""
        if self._exhausted:
            return 0
        useful = sum(group.state not in (GroupState.FILTERED, GroupState.FAILED) for group in self._window)
        newest = min(self.version + self._max_staleness + 1, self.last_version)
        allowed = (newest - self._start_version) * self._batch_size
        room = allowed - self._consumed - useful
        if self._max_staleness == 0:
            # Exact on-policy: a step's groups are generated in rounds, the next one when the last is complete.
            if any(not group.done for group in self._window):
                return 0
            if len(self._window) >= self._max_gen_batches * self._batch_size:
                return 0
        elif self._ended_without_use() >= self._max_gen_batches * self._batch_size:
            return 0
        return max(room, 0)

    def admit(self) -> list[Group]:
        """Take prompts from the data while there is capacity."""
        admitted: list[Group] = []
        for _ in range(self.capacity()):
            prompt = next(self._prompts, None)
            if prompt is None:
                self._exhausted = True
                break
            group = Group(order=self._admitted, prompt=prompt)
            self._admitted += 1
            self._window.append(group)
            admitted.append(group)
        return admitted

    def available(self) -> bool:
        """True when `take` would return a batch: B ready groups in order, or fewer when no more can come."""
        ready = 0
        for group in self._window:
            if not group.done:
                return False
            ready += group.state is GroupState.READY
            if ready == self._batch_size:
                return True
        return self.capacity() == 0

    def reject_stale(self) -> list[Group]:
        """The door: ready groups that are too old for the next update go back to be generated again, and are returned.

        Admission makes this impossible for an engine that serves the version it reports; it is checked all the same.
        """
        oldest_allowed = self.version - self._max_staleness
        stale = [
            group for group in self._window if group.state is GroupState.READY and group.oldest_version < oldest_allowed
        ]
        for group in stale:
            group.restart()
        return stale

    def take(self) -> Batch:
        """Consume the next step's groups; none of them is ready when every prompt failed, or dynamic sampling left all out."""
        batch = Batch([], [], [])
        while self._window and len(batch.ready) < self._batch_size:
            group = self._window[0]
            if not group.done:
                break
            self._window.popleft()
            self._frontier = group.prompt.next_cursor
            self.prompts_left -= 1
            ended = {
                GroupState.READY: batch.ready,
                GroupState.FILTERED: batch.filtered,
                GroupState.FAILED: batch.failed,
            }
            ended[group.state].append(group)
        self._consumed += len(batch.ready)
        self._steps += bool(batch.ready)
        return batch

    def trained(self, version: int) -> None:
        """The engines serve `version` now."""
        # A step that trained on fewer groups than B (dynamic sampling at its bound) must not leave room behind.
        self.version = self._steps = version
        self._consumed = (version - self._start_version) * self._batch_size

    @property
    def at_end(self) -> bool:
        """Every prompt of the data is consumed."""
        return self.prompts_left == 0

    def _ended_without_use(self) -> int:
        return sum(group.state in (GroupState.FILTERED, GroupState.FAILED) for group in self._window)
