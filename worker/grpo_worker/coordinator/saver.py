"""Checkpoints: the trainer writes its shards, the coordinator its own state, and one rename makes them one checkpoint.

Invariant: `coordinator.json` and the shards are of the same step; a save that fails leaves the checkpoints of before, is told, and does
not stop the run, except when the run's last save fails.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_worker.checkpoint import (
    CheckpointTransaction,
    ResumePoint,
    find_resume,
    list_checkpoints,
    preflight,
    prune,
    read_manifest,
    remove_leftovers,
    storage_errors,
)
from grpo_worker.config.run import Checkpoint
from grpo_worker.coordinator.members import Emit
from grpo_worker.coordinator.trainer_client import TrainerClient, TrainerFailed, TrainerLost
from grpo_worker.errors import CheckpointDamagedError, ConfigError, GRPOError
from grpo_worker.protocol.messages import (
    LoadReply,
    LoadRequest,
    SaveReply,
    SaveRequest,
    SaveStatusReply,
    SaveStatusRequest,
)

POLL_SECONDS = 0.5
STATE_FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """A checkpoint of this run."""

    step: int
    path: Path
    time: float
    seconds: float


def complete_checkpoints(root: Path) -> list[Saved]:
    """What is on disk with a readable manifest, saved last first; contents are not verified here."""
    found = []
    for path in list_checkpoints(root):
        try:
            manifest = read_manifest(path)
        except GRPOError:
            continue  # damaged, or removed meanwhile: a resume would say so
        found.append((manifest.sequence, Saved(manifest.step, path, manifest.time, 0.0)))
    return [saved for _, saved in sorted(found, key=lambda pair: pair[0], reverse=True)]


class Saver:
    """Saves in the background, one at a time; `last` is the newest complete checkpoint."""

    def __init__(
        self,
        root: Path,
        section: Checkpoint,
        trainer: TrainerClient,
        emit: Emit,
        on_saved: Callable[[Saved], None],
        on_kept: Callable[[Sequence[Saved]], None] = lambda checkpoints: None,
    ) -> None:
        self._root = root
        self._section = section
        self._trainer = trainer
        self._emit = emit
        self._on_saved = on_saved
        self._on_kept = on_kept
        self._running: asyncio.Task[None] | None = None
        self._failure: GRPOError | None = None
        self.last: Saved | None = None
        self.stall_seconds = 0.0

    def prepare(self, needed_bytes: int) -> None:
        """Can checkpoints be kept here? Raises ConfigError before any time is spent."""
        preflight(self._root, needed_bytes)
        for name in remove_leftovers(self._root):
            self._emit("info", "CheckpointLeftover", f"removed {name}, which a killed save had left")
        self._on_kept(complete_checkpoints(self._root))

    async def resume(
        self, mode: str, check: Callable[[Mapping[str, Any]], None] = lambda state: None
    ) -> tuple[ResumePoint, dict[str, Any]] | None:
        """Load the checkpoint that `checkpoint.resume` names into the trainer; None to start at step 0.

        Args:
            check: raises for the coordinator's state of a checkpoint that this run must not go on from, before its shards are loaded.

        Raises CheckpointDamagedError, ConfigError, and what `check` raises.
        """
        refused: dict[Path, str] = {}
        told: set[Path] = set()
        while True:
            decision = await asyncio.to_thread(find_resume, self._root, mode, refused)
            for damaged in decision.skipped:
                if damaged.path not in told:
                    self._emit("warning", "CheckpointDamaged", f"passed over: {damaged.reason}")
                told.add(damaged.path)
            if decision.point is None:
                return None
            try:
                return decision.point, await self._load(decision.point, check)
            except TrainerFailed as error:
                if not error.recoverable:
                    raise
                refused[decision.point.path] = str(error)

    async def _load(self, point: ResumePoint, check: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        """The coordinator's state. Raises TrainerFailed, recoverable when the trainer has found the shards damaged."""
        try:
            state = json.loads(await asyncio.to_thread(point.coordinator_file.read_text))
            if state["format"] != STATE_FORMAT:
                raise ConfigError(
                    f"{point.path}: coordinator.json has format {state['format']}, this program reads {STATE_FORMAT}"
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointDamagedError(f"{point.coordinator_file}: cannot be read: {error!r}") from error
        check(state)
        reply = await self._trainer.call(LoadRequest(directory=str(point.path)), LoadReply)
        if reply.step != point.step:
            raise CheckpointDamagedError(
                f"{point.path}: its shards are of step {reply.step}, its manifest of step {point.step}"
            )
        self.last = Saved(point.step, point.path, point.manifest.time, 0.0)
        return state

    async def save(self, epoch: int, step: int, state: Mapping[str, Any]) -> None:
        """Start a save of the trainer's present state; waits for the one before. Returns when training may go on."""
        await self.wait()
        if self.last is not None and self.last.step == step:
            return
        self._failure = None
        started = time.monotonic()
        try:
            transaction = await asyncio.to_thread(
                self._begin, epoch, step, json.dumps({"format": STATE_FORMAT, **state}, indent=1)
            )
        except GRPOError as error:
            self._failed(step, error)
            return
        try:
            reply = await self._trainer.call(SaveRequest(directory=str(transaction.path), step=step), SaveReply)
        except GRPOError as error:
            await asyncio.to_thread(transaction.abort)
            if isinstance(error, TrainerLost) or not getattr(error, "recoverable", True):
                raise  # the trainer's own trouble; the storage's costs this save alone
            self._failed(step, error)
            return
        self.stall_seconds = time.monotonic() - started
        self._emit(
            "info", "CheckpointSaving", f"saving step {step}; training stood still for {reply.stall_seconds:.2f} s"
        )
        self._running = asyncio.create_task(self._finish(transaction, step, started))

    def _begin(self, epoch: int, step: int, state: str) -> CheckpointTransaction:
        """Raises ConfigError."""
        transaction = CheckpointTransaction(self._root, epoch, step)
        try:
            with storage_errors(self._root, f"saving step {step}"):
                (transaction.path / "coordinator.json").write_text(state)
        except GRPOError:
            transaction.abort()
            raise
        return transaction

    async def wait(self) -> None:
        """Until no save is under way."""
        if self._running is not None:
            await self._running
            self._running = None

    async def finish(self, step: int) -> None:
        """Wait for the last save of the run. Raises what made it fail."""
        await self.wait()
        if self._failure is not None and (self.last is None or self.last.step != step):
            raise self._failure

    async def _finish(self, transaction: CheckpointTransaction, step: int, started: float) -> None:
        try:
            status = await self._written()
            if status.error:
                raise ConfigError(status.error)
            await asyncio.to_thread(transaction.commit, status.files)
            saved = Saved(step, transaction.final_path, time.time(), time.monotonic() - started)
        except GRPOError as error:
            await asyncio.to_thread(transaction.abort)
            self._failed(step, error)
            return
        except BaseException:
            transaction.abort()
            raise
        self.last = saved
        self._emit("info", "CheckpointSaved", f"saved {saved.path.name} in {saved.seconds:.1f} s")
        self._on_saved(saved)
        try:
            await asyncio.to_thread(prune, self._root, self._section.keep_last, self._section.resume)
        except GRPOError as error:
            self._emit("warning", "CheckpointPruneFailed", f"old checkpoints could not be removed: {error}")
        self._on_kept(await asyncio.to_thread(complete_checkpoints, self._root))

    async def _written(self) -> SaveStatusReply:
        while True:
            status = await self._trainer.call(SaveStatusRequest(), SaveStatusReply)
            if status.done:
                return status
            await asyncio.sleep(POLL_SECONDS)

    def _failed(self, step: int, error: GRPOError) -> None:
        self._failure = error
        kept = f"the last whole checkpoint is {self.last.path.name}" if self.last else "there is no checkpoint yet"
        self._emit("error", "CheckpointFailed", f"step {step} was not saved, {kept}: {error}")
