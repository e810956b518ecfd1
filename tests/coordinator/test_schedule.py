"""Which prompts may be generated and which groups a step trains on, under every order in which groups can come back."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from coordinator_helpers import prompt, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_worker.coordinator.groups import Group, GroupState
from grpo_worker.coordinator.schedule import Batch, Schedule
from grpo_worker.data.dataset import Prompt
from grpo_worker.data.order import Cursor


def prompts(number: int, start: int = 0) -> Iterator[Prompt]:
    return (prompt(position) for position in range(start, number))


def make(number: int = 100, *, batch_size: int = 4, max_staleness: int = 0, max_gen_batches: int = 1, version: int = 0,
         last_version: int | None = 10, start: int = 0) -> Schedule:  # fmt: skip
    return Schedule(
        prompts(number, start),
        Cursor(0, start),
        batch_size=batch_size,
        max_staleness=max_staleness,
        max_gen_batches=max_gen_batches,
        version=version,
        prompts_left=number - start,
        last_version=last_version,
    )


def end(group: Group, state: GroupState = GroupState.READY, version: int = 0) -> None:
    group.state = state
    group.samples = [sample([1], 1.0, version=version)] if state is GroupState.READY else []


def uids(groups: list[Group]) -> list[str]:
    return [group.uid for group in groups]


@pytest.mark.parametrize(("staleness", "admitted"), [(0, 4), (1, 8), (2, 12), (5, 24)])
def test_what_is_admitted_at_first_is_bounded_by_staleness(staleness: int, admitted: int) -> None:
    schedule = make(max_staleness=staleness)
    assert len(schedule.admit()) == admitted
    assert schedule.admit() == []


def test_nothing_is_generated_for_a_step_beyond_the_last() -> None:
    schedule = make(max_staleness=5, last_version=2)
    assert len(schedule.admit()) == 8


def test_a_resumed_run_admits_as_a_new_one_from_its_version_on() -> None:
    schedule = make(max_staleness=1, version=7, last_version=10, start=28)
    admitted = schedule.admit()
    assert uids(admitted) == [f"0-{index}" for index in range(28, 36)]
    assert schedule.frontier == Cursor(0, 28)


def test_groups_are_taken_in_the_order_of_admission() -> None:
    schedule = make(max_staleness=1)
    groups = schedule.admit()
    for group in reversed(groups[1:]):
        end(group)
    assert not schedule.available()
    end(groups[0])
    assert schedule.available()
    assert uids(schedule.take().ready) == uids(groups[:4])
    assert schedule.frontier == Cursor(0, 4)
    assert uids(list(schedule.window)) == uids(groups[4:])


def test_on_policy_the_next_step_is_admitted_only_under_its_weights() -> None:
    schedule = make()
    for group in schedule.admit():
        end(group)
    schedule.take()
    assert schedule.capacity() == 0
    schedule.trained(1)
    assert schedule.capacity() == 4


def test_filtered_groups_are_replaced_once_the_round_is_complete() -> None:
    schedule = make(max_gen_batches=3)
    first = schedule.admit()
    for group, state in zip(first, ["READY", "FILTERED", "FILTERED", "READY"], strict=True):
        assert schedule.admit() == []  # on-policy: a round is generated as a whole
        end(group, GroupState[state])
    assert not schedule.available()
    second = schedule.admit()
    assert len(second) == 2
    for group in second:
        end(group)
    batch = schedule.take()
    assert uids(batch.ready) == ["0-0", "0-3", "0-4", "0-5"]
    assert uids(batch.filtered) == ["0-1", "0-2"]
    assert schedule.frontier == Cursor(0, 6)


def test_at_the_bound_of_dynamic_sampling_a_step_trains_on_what_there_is() -> None:
    schedule = make(max_gen_batches=2)
    for kept in (1, 0, 0):
        for index, group in enumerate(schedule.admit()):
            end(group, GroupState.READY if index < kept else GroupState.FILTERED)
    assert schedule.available()
    batch = schedule.take()
    assert len(batch.ready) == 1
    schedule.trained(1)
    assert schedule.capacity() == 4  # the three that were missing leave no room behind


@pytest.mark.parametrize("staleness", [0, 2])
def test_at_the_bound_a_batch_may_have_nothing_to_train_on(staleness: int) -> None:
    schedule = make(max_staleness=staleness, max_gen_batches=2)
    while admitted := schedule.admit():
        for group in admitted:
            end(group, GroupState.FILTERED)
    assert schedule.available()
    batch = schedule.take()
    assert not batch.ready
    assert len(batch.filtered) >= 8
    assert not schedule.at_end


def test_failed_groups_are_reported_with_the_step() -> None:
    schedule = make()
    for index, group in enumerate(schedule.admit()):
        end(group, GroupState.FAILED if index == 2 else GroupState.READY)
    batch = schedule.take()
    assert (len(batch.ready), uids(batch.failed)) == (3, ["0-2"])


def test_prompts_that_fill_no_batch_are_left_out() -> None:
    schedule = make(11, last_version=None)
    assert schedule.last_version == 2
    for step in (1, 2):
        for group in schedule.admit():
            end(group)
        assert len(schedule.take().ready) == 4
        schedule.trained(step)
        assert schedule.last_version == 2
    assert schedule.admit() == []
    assert (schedule.prompts_left, schedule.frontier) == (3, Cursor(0, 8))


def generate(schedule: Schedule, states: Iterator[str]) -> Batch:
    """One on-policy step whose groups end in these states."""
    while not schedule.available():
        for group in schedule.admit():
            end(group, GroupState[next(states)])
    return schedule.take()


def test_the_end_of_the_data_ends_the_run_with_a_smaller_step() -> None:
    schedule = make(10, max_gen_batches=4, last_version=None)
    states = iter(
        ["READY", "READY", "READY", "READY", "READY", "FILTERED", "FILTERED", "READY", "FILTERED", "FILTERED"]
    )
    for step, expected in enumerate((4, 2), 1):
        assert len(generate(schedule, states).ready) == expected
        schedule.trained(step)
    assert schedule.last_version == 2
    assert schedule.admit() == []
    assert schedule.at_end


@pytest.mark.parametrize(
    ("batch_size", "steps_after"), [(8, 8), (16, 6), (4, 12), (32, 5), (64, 4)], ids=lambda value: str(value)
)
def test_steps_left_follow_from_prompts_left_whatever_the_batch_was_before(batch_size: int, steps_after: int) -> None:
    """64 prompts, four steps of 8 behind."""
    schedule = make(64, batch_size=batch_size, version=4, start=32, last_version=None)
    assert schedule.last_version == steps_after
    trained = 0
    while schedule.version < schedule.last_version:
        for group in schedule.admit():
            end(group, version=schedule.version)
        trained += len(schedule.take().ready)
        assert schedule.last_version == steps_after  # also while the step is being trained
        schedule.trained(schedule.version + 1)
    assert trained == (steps_after - 4) * batch_size
    assert schedule.prompts_left == 32 - trained


def test_filtered_prompts_cost_planned_steps_as_they_go() -> None:
    schedule = make(17, max_gen_batches=4, last_version=None)
    assert schedule.last_version == 4
    assert len(generate(schedule, iter(["READY", "FILTERED", "READY", "FILTERED", "READY", "READY"])).ready) == 4
    schedule.trained(1)
    assert schedule.prompts_left == 17 - 6
    assert schedule.last_version == 1 + 11 // 4


def test_a_limit_of_steps_that_is_reached_already_leaves_nothing_to_do() -> None:
    assert make(64, version=7, start=28, last_version=5).last_version == 7


def test_a_sample_that_is_too_old_is_sent_back_at_the_door() -> None:
    schedule = make(max_staleness=1, version=3, start=0)
    groups = schedule.admit()
    for index, group in enumerate(groups[:4]):
        end(group, version=1 if index == 2 else 2)
    (stale,) = schedule.reject_stale()
    assert stale is groups[2]
    assert (stale.state, stale.samples) == (GroupState.WAITING, [])
    assert not schedule.available()
    end(stale, version=3)
    assert schedule.reject_stale() == []
    assert schedule.available()


@dataclass
class Simulation:
    """A run in which groups come back in any order, at any time, good or bad; engines serve the newest weights when they begin."""

    schedule: Schedule
    draw: st.DataObject
    max_staleness: int
    batch_size: int
    states: list[GroupState]
    running: list[tuple[Group, int]] = field(default_factory=list)
    waiting: list[Group] = field(default_factory=list)
    admitted: list[Group] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    staleness: list[int] = field(default_factory=list)

    def feed(self) -> None:
        new = self.schedule.admit()
        # Each of them may be trained at the earliest as the B-th useful group after those before it.
        self.admitted += new
        self.waiting += new

    def advance(self) -> None:
        """Some waiting group is sent out, or some group that is out comes back."""
        choices = ["send"] * bool(self.waiting) + ["return"] * bool(self.running)
        if self.draw.draw(st.sampled_from(choices)) == "send":
            index = self.draw.draw(st.integers(0, len(self.waiting) - 1))
            self.running.append((self.waiting.pop(index), self.schedule.version))
        else:
            index = self.draw.draw(st.integers(0, len(self.running) - 1))
            group, version = self.running.pop(index)
            end(group, self.draw.draw(st.sampled_from(self.states)), version)

    def consume(self) -> Batch:
        first = self.schedule.window[0].prompt.position
        assert self.schedule.frontier == Cursor(0, first)  # everything before the frontier has ended
        batch = self.schedule.take()
        together = [*batch.ready, *batch.filtered, *batch.failed]
        self.ended.update(group.uid for group in together)
        orders = sorted(group.order for group in together)
        assert orders == list(range(first, first + len(orders)))  # in order, without a gap
        self.staleness += [self.schedule.version - group.oldest_version for group in batch.ready]
        return batch

    def run(self) -> None:
        while self.schedule.version < self.schedule.last_version:
            self.feed()
            assert self.schedule.reject_stale() == []  # the door never has to refuse
            if self.schedule.available():
                if not self.schedule.window:
                    break
                if not self.consume().ready:
                    break
                self.schedule.trained(self.schedule.version + 1)
            elif self.waiting or self.running:
                self.advance()
            else:
                raise AssertionError("the run stands still: nothing to wait for, and nothing to train on")


@settings(max_examples=120, deadline=None)
@given(data=st.data(), batch_size=st.integers(1, 4), max_staleness=st.integers(0, 3), number=st.integers(1, 40),
       last_version=st.integers(1, 6), max_gen_batches=st.integers(1, 4), bad=st.integers(0, 2))  # fmt: skip
def test_any_order_of_events_keeps_the_promises(
    data: st.DataObject, batch_size: int, max_staleness: int, number: int, last_version: int, max_gen_batches: int, bad: int
) -> None:  # fmt: skip
    schedule = make(
        number,
        batch_size=batch_size,
        max_staleness=max_staleness,
        max_gen_batches=max_gen_batches,
        last_version=last_version,
    )
    states = [GroupState.READY] * 3 + [GroupState.FILTERED, GroupState.FAILED][:bad]
    simulation = Simulation(schedule, data, max_staleness, batch_size, states)
    simulation.run()
    assert all(0 <= staleness <= max_staleness for staleness in simulation.staleness)
    assert all(count == 1 for count in simulation.ended.values())
    assert uids(simulation.admitted) == [f"0-{index}" for index in range(len(simulation.admitted))]
    left = set(uids(simulation.admitted)) - simulation.ended.keys()
    assert left == set(uids(list(schedule.window)))
    assert schedule.frontier.position == len(simulation.ended)
    if not bad:
        assert len(simulation.admitted) <= last_version * batch_size
        assert left == set()
        assert schedule.version == min(last_version, number // batch_size)


@pytest.mark.parametrize("batches", [1, 2])
def test_data_that_ends_with_the_bound_of_dynamic_sampling_has_ended(batches: int) -> None:
    schedule = make(4 * batches, max_gen_batches=batches)
    while admitted := schedule.admit():
        for group in admitted:
            end(group, GroupState.FILTERED)
    batch = schedule.take()
    assert len(batch.filtered) == 4 * batches and not batch.ready
    assert schedule.at_end
