"""Saves are whole or absent; a failed one is told and does not stop the run, unless it is the last."""

import errno
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from coordinator_helpers import World, world

from grpo_worker.checkpoint import latest, list_checkpoints, verify
from grpo_worker.config.run import Checkpoint
from grpo_worker.coordinator import saver as saver_module
from grpo_worker.coordinator.saver import Saved, Saver, complete_checkpoints
from grpo_worker.coordinator.trainer_client import TrainerFailed, TrainerLost
from grpo_worker.errors import CheckpointDamagedError, ConfigError, DataError
from grpo_worker.protocol.messages import (
    ErrorReply,
    LoadReply,
    LoadRequest,
    SaveReply,
    SaveRequest,
    SaveStatusReply,
    SaveStatusRequest,
)

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "POLL_SECONDS", 0.01)


class Shards:
    """The trainer's side of saves: writes files, reports it after some questions, fails when told to."""

    def __init__(self, here: World) -> None:
        self.errors: list[str] = []  # of the next saves; "" is none
        self.questions = 0
        self.loaded: list[str] = []
        here.trainer.answers |= {SaveRequest: self.save, SaveStatusRequest: self.status, LoadRequest: self.load}

    def save(self, request: SaveRequest) -> Any:
        self.directory, self.questions = Path(request.directory), 0
        for name in ("actor/model.safetensors", "state/shard-0"):
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} of step {request.step}")
        return SaveReply(stall_seconds=0.25)

    def status(self, request: SaveStatusRequest) -> Any:
        self.questions += 1
        if self.questions < 3:
            return SaveStatusReply(done=False)
        return SaveStatusReply(done=True, error=self.errors.pop(0) if self.errors else "")

    def load(self, request: LoadRequest) -> Any:
        try:
            verify(Path(request.directory), below="state")
        except CheckpointDamagedError as error:
            return ErrorReply(reason=error.reason, message=str(error), exit_code=81, recoverable=True)
        self.loaded.append(request.directory)
        return LoadReply(step=int(request.directory.rpartition("_")[2]))


@asynccontextmanager
async def saving(
    root: Path, keep_last: int = 2, resume: str = "auto"
) -> AsyncIterator[tuple[Saver, Shards, World, list[Saved]]]:
    async with world(version=None) as here:
        told: list[Saved] = []
        shards = Shards(here)
        saver = Saver(root, Checkpoint(keepLast=keep_last, resume=resume), here.trainer_client, here.emit, told.append)
        saver.prepare(1000)
        yield saver, shards, here, told


def entries(root: Path) -> list[str]:
    """Everything in the checkpoint root, what a save has left included."""
    return sorted(path.name for path in root.iterdir())


def names(root: Path) -> list[str]:
    return [path.name for path in list_checkpoints(root)]


async def test_a_checkpoint_holds_shards_and_state_of_one_step(tmp_path: Path) -> None:
    async with saving(tmp_path) as (saver, _, here, told):
        await saver.save(1, 20, {"step": 20, "data": {"position": 7}})
        assert names(tmp_path) == []  # under way: training goes on
        await saver.finish(20)
    (directory,) = list_checkpoints(tmp_path)
    assert directory.name == "epoch_1_step_20"
    state = json.loads((directory / "coordinator.json").read_text())
    assert (state["step"], state["data"]) == (20, {"position": 7})
    assert (directory / "state" / "shard-0").read_text() == "state/shard-0 of step 20"
    assert latest(tmp_path) is not None
    assert [saved.step for saved in told] == [20]
    assert here.reasons() == ["CheckpointSaving", "CheckpointSaved"]


async def test_older_checkpoints_are_pruned(tmp_path: Path) -> None:
    async with saving(tmp_path, keep_last=2) as (saver, *_):
        for step in (1, 2, 3):
            await saver.save(0, step, {"step": step})
        await saver.finish(3)
    assert sorted(names(tmp_path)) == ["epoch_0_step_2", "epoch_0_step_3"]


async def test_a_step_is_saved_once(tmp_path: Path) -> None:
    async with saving(tmp_path) as (saver, _, here, _told):
        await saver.save(0, 1, {"step": 1})
        await saver.save(0, 1, {"step": 1})
        await saver.finish(1)
        assert sum(isinstance(call, SaveRequest) for call in here.trainer.calls) == 1


async def test_a_save_that_fails_leaves_the_one_before_and_the_run_goes_on(tmp_path: Path) -> None:
    async with saving(tmp_path) as (saver, shards, here, told):
        await saver.save(0, 1, {"step": 1})
        await saver.wait()
        shards.errors = ["No space left on device"]
        await saver.save(0, 2, {"step": 2})
        await saver.wait()
        assert names(tmp_path) == ["epoch_0_step_1"]
        assert not [name for name in entries(tmp_path) if name.startswith(".tmp-")]
        level, reason, message = here.events[-1]
        assert (level, reason) == ("error", "CheckpointFailed")
        assert "step 2 was not saved, the last whole checkpoint is epoch_0_step_1" in message
        assert "No space left" in message
        await saver.save(0, 3, {"step": 3})
        await saver.finish(3)
    assert [saved.step for saved in told] == [1, 3]


async def test_the_last_save_of_a_run_that_fails_ends_it(tmp_path: Path) -> None:
    async with saving(tmp_path) as (saver, shards, _, _told):
        shards.errors = ["No space left on device"]
        await saver.save(0, 1, {"step": 1})
        with pytest.raises(ConfigError, match="No space left"):
            await saver.finish(1)


async def test_the_last_step_is_tried_again_at_the_end(tmp_path: Path) -> None:
    async with saving(tmp_path) as (saver, shards, *_):
        shards.errors = ["busy"]
        await saver.save(0, 1, {"step": 1})
        await saver.wait()
        await saver.save(0, 1, {"step": 1})
        await saver.finish(1)
    assert names(tmp_path) == ["epoch_0_step_1"]


@pytest.mark.parametrize("recoverable", [True, False])
async def test_an_error_of_the_trainer_says_whether_the_run_goes_on(tmp_path: Path, recoverable: bool) -> None:
    async with saving(tmp_path) as (saver, _, here, _told):
        error = ErrorReply(reason="StorageFull", message="no space", exit_code=78, recoverable=recoverable)
        here.trainer.answers[SaveRequest] = lambda request: error
        if recoverable:
            await saver.save(0, 1, {"step": 1})
            assert here.reasons() == ["CheckpointFailed"]
        else:
            with pytest.raises(TrainerFailed):
                await saver.save(0, 1, {"step": 1})
        assert entries(tmp_path) == []


async def test_a_trainer_that_dies_while_it_copies_ends_the_run(tmp_path: Path) -> None:
    async with saving(tmp_path) as (saver, _, here, _told):
        here.trainer.answers[SaveRequest] = lambda request: None
        with pytest.raises(TrainerLost):
            await saver.save(0, 1, {"step": 1})
        assert entries(tmp_path) == []


async def test_a_trainer_that_dies_while_it_writes_leaves_no_checkpoint(tmp_path: Path) -> None:
    async with saving(tmp_path) as (saver, _, here, _told):
        here.trainer.answers[SaveStatusRequest] = lambda request: None
        await saver.save(0, 1, {"step": 1})
        with pytest.raises(TrainerLost):
            await saver.finish(1)
        assert entries(tmp_path) == []


async def test_pruning_that_fails_does_not_unmake_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("checkpoint.path: not permitted")

    monkeypatch.setattr(saver_module, "prune", refuse)
    async with saving(tmp_path) as (saver, _, here, told):
        await saver.save(0, 1, {"step": 1})
        await saver.finish(1)
        assert saver.last is not None
        assert [saved.step for saved in told] == [1]
        assert ("warning", "CheckpointPruneFailed") in [event[:2] for event in here.events]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
async def test_storage_that_fails_for_a_moment_costs_one_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(self: Path, *arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    async with saving(tmp_path) as (saver, _, here, _told):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", fail)
            await saver.save(0, 1, {"step": 1})
        assert here.reasons() == ["CheckpointFailed"]
        await saver.save(0, 2, {"step": 2})
        await saver.finish(2)
    assert names(tmp_path) == ["epoch_0_step_2"]


async def saved_run(root: Path, *steps: int) -> None:
    async with saving(root, keep_last=9) as (saver, *_):
        for step in steps:
            await saver.save(0, step, {"step": step})
        await saver.finish(steps[-1])


async def test_a_resumed_run_loads_the_newest_checkpoint(tmp_path: Path) -> None:
    await saved_run(tmp_path, 1, 2)
    async with saving(tmp_path) as (saver, shards, *_):
        resumed = await saver.resume("auto")
        assert resumed is not None
        point, state = resumed
        assert (point.step, state["step"]) == (2, 2)
        assert shards.loaded == [str(tmp_path / "epoch_0_step_2")]
        assert saver.last is not None
        assert saver.last.step == 2


async def test_the_checkpoint_that_the_document_names_is_kept(tmp_path: Path) -> None:
    await saved_run(tmp_path, 1, 2)
    async with saving(tmp_path, keep_last=1, resume="epoch_0_step_1") as (saver, *_):
        assert await saver.resume("epoch_0_step_1") is not None
        for step in (2, 3, 4):
            await saver.save(0, step, {"step": step})
        await saver.finish(4)
        assert sorted(names(tmp_path)) == ["epoch_0_step_1", "epoch_0_step_4"]
        assert await saver.resume("epoch_0_step_1") is not None, "the same document starts again"


async def test_when_all_shards_are_damaged_the_run_ends_with_each_of_them_told(tmp_path: Path) -> None:
    await saved_run(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"epoch_0_step_{step}" / "state" / "shard-0").write_text("state/shard-0 of step 9")
    async with saving(tmp_path) as (saver, *_):
        with pytest.raises(
            CheckpointDamagedError, match=r"2 damaged.*\n.*step_2: state/shard-0: its content changed.*\n.*step_1"
        ):
            await saver.resume("auto")
        with pytest.raises(CheckpointDamagedError, match="step_2: state/shard-0: its content changed"):
            await saver.resume("epoch_0_step_2")


async def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path: Path) -> None:
    await saved_run(tmp_path, 1, 2)
    (tmp_path / "epoch_0_step_2" / "state" / "shard-0").write_text("state/shard-0 of step 9")
    async with saving(tmp_path) as (saver, _, here, _told):
        resumed = await saver.resume("auto")
        assert resumed is not None
        assert resumed[0].step == 1
        assert here.reasons() == ["CheckpointDamaged"]


@pytest.mark.parametrize("mode", ["auto", "never"])
async def test_without_a_checkpoint_a_run_starts_anew(tmp_path: Path, mode: str) -> None:
    async with saving(tmp_path) as (saver, *_):
        assert await saver.resume(mode) is None


def another_step(request: LoadRequest) -> LoadReply:
    return LoadReply(step=9)


@pytest.mark.parametrize(("answer", "words"), [(another_step, r"shards are of step 9, its manifest of step 1")])
async def test_shards_of_another_step_are_refused(
    tmp_path: Path, answer: Callable[[LoadRequest], LoadReply], words: str
) -> None:
    await saved_run(tmp_path, 1)
    async with saving(tmp_path) as (saver, _, here, _told):
        here.trainer.answers[LoadRequest] = answer
        with pytest.raises(CheckpointDamagedError, match=words):
            await saver.resume("auto")


async def test_what_a_killed_save_left_is_removed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / ".tmp-epoch_0_step_3").mkdir()
    async with saving(tmp_path) as (_, _, here, _told):
        assert here.reasons() == ["CheckpointLeftover"]
    assert entries(tmp_path) == []


async def test_complete_checkpoints_are_told_newest_first_with_those_of_an_earlier_run(tmp_path: Path) -> None:
    told: list[list[int]] = []
    async with world(version=None) as here:
        Shards(here)
        for steps in ((1, 2), (3,)):
            saver = Saver(
                tmp_path, Checkpoint(keepLast=2), here.trainer_client, here.emit, lambda saved: None,
                lambda kept: told.append([saved.step for saved in kept]),
            )  # fmt: skip
            saver.prepare(1000)
            for step in steps:
                await saver.save(0, step, {"step": step})
                await saver.wait()
    assert told == [[], [1], [2, 1], [2, 1], [3, 2]]


async def test_a_checkpoint_without_a_readable_manifest_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "epoch_0_step_5").mkdir()
    assert complete_checkpoints(tmp_path) == []


async def test_a_checkpoint_of_another_model_is_refused_before_its_shards_are_loaded(tmp_path: Path) -> None:
    await saved_run(tmp_path, 1)

    def check(state: Mapping[str, Any]) -> None:
        raise DataError("model.path: it was a and is b")

    async with saving(tmp_path) as (saver, shards, _, _):
        with pytest.raises(DataError, match="it was a and is b"):
            await saver.resume("auto", check)
    assert shards.loaded == []
