"""Saving and loading of the trainer's part of a checkpoint: `actor/` (Hugging Face format) and `state/` (DCP shards).

Invariants: `save` returns when the state is copied to host memory; what is written later is that copy, whatever the
training does. A write that fails is reported, with path and reason, and stops nothing. `load` compares each file with its
checksum while it reads it, and restores bit for bit on the same number of ranks; on another number DCP reshards the tensors and the random generators of new ranks are seeded
anew.
"""

import errno
import json
import logging
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from grpo_worker.checkpoint.files import make_directory, seal
from grpo_worker.checkpoint.layout import ACTOR_DIRECTORY, STATE_DIRECTORY
from grpo_worker.checkpoint.manifest import read_manifest
from grpo_worker.errors import CheckpointDamagedError, GRPOError, StalledError, memory_was_full
from grpo_worker.protocol.messages import SaveStatusReply
from grpo_worker.storage import as_storage_error, free_bytes
from grpo_worker.trainer.distributed import Ranks, seed_everything
from grpo_worker.trainer.failures import OperationRefused, damaged, root_cause
from grpo_worker.trainer.hf_format import WeightFiles, write_beside_weights
from grpo_worker.trainer.model import PolicyModel, named_parameters
from grpo_worker.trainer.optimizer import PolicyOptimizer
from grpo_worker.trainer.shard_files import METADATA_FILE, ShardReader, ShardWriter, system_error
from grpo_worker.trainer.update import TrainerState, release_gathered

FACTS_FILE = "trainer.json"
NO_SPACE_BYTES = 1 << 24

Result = TypeVar("Result")

PASSING_ERRORS = (errno.ESTALE, errno.ETIMEDOUT)  # of storage that may be itself again soon

log = logging.getLogger(__name__)


class ShardStore:
    """Saves of one trainer, one at a time; each rank writes and hashes its own files."""

    def __init__(
        self,
        model: PolicyModel,
        optimizer: PolicyOptimizer,
        ranks: Ranks,
        save_dtype: torch.dtype,
        source: Path,
        seed: int,
        timeout_seconds: float,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.save_dtype = save_dtype
        self.source = source
        self.seed = seed
        self.timeout_seconds = timeout_seconds
        self._writing: threading.Thread | None = None
        self._status = SaveStatusReply(done=True)

    def save(self, directory: Path, state: TrainerState) -> float:
        """Copy the state and start to write it below `directory`. Returns the seconds of stall. Collective."""
        started = time.perf_counter()
        self._finish_earlier()
        weights = WeightFiles.copied(self.model, self.save_dtype, self.ranks)
        facts = {**asdict(state), "world_size": self.ranks.world_size, "torch": torch.__version__}
        generators = random_state()
        self._status = SaveStatusReply(done=False)
        future: Any = dcp.async_save(
            self._tensors(),
            storage_writer=ShardWriter(directory / STATE_DIRECTORY, thread_count=1),
            process_group=self.ranks.saving,
        )

        def write() -> None:
            error = ""
            try:
                getattr(future, "upload_completion", future).result(self.timeout_seconds)
                files = self._write_rest(directory, weights, facts, generators)
            except (
                Exception,
                CheckpointException,
            ) as exception:  # disk full, read-only, vanished: all reach the coordinator as text
                error, files = _write_error(directory, facts["step"], exception), {}
            self._conclude(error, files, started)

        self._writing = threading.Thread(target=write, name="checkpoint-writer", daemon=True)
        self._writing.start()
        return time.perf_counter() - started

    def status(self, wait_seconds: float = 0.0) -> SaveStatusReply:
        """State of the last save, on this rank; complete on rank 0. Safe to call from any thread."""
        writing = self._writing
        if writing is not None:
            writing.join(wait_seconds)
        return self._status

    def load(self, directory: Path) -> TrainerState:
        """Restore from `directory`. Collective. Raises OperationRefused, on all ranks, with the damage that any of them has found;
        weights and optimizer are then worth nothing until another load has succeeded. Raises RetryableError, or what the
        allocator raised, when the checkpoint is not what failed."""
        self._finish_earlier()
        reader, facts, generators = self._agree(directory, lambda: self._open(directory))
        try:
            dcp.load(self._tensors(), storage_reader=reader, process_group=self.ranks.control)
        except CheckpointException as exception:  # the same on all ranks
            if memory_was_full(exception):
                raise
            system = system_error(exception)
            if system is not None and system.errno in PASSING_ERRORS:
                raise as_storage_error(system, directory, "loading a checkpoint") from exception
            raise OperationRefused(damaged(directory, exception)) from exception
        self._restore_generators(facts, generators)
        release_gathered(self.model)
        return TrainerState(facts["step"], facts["updates"], facts["skipped_updates"])

    def _open(self, directory: Path) -> tuple[ShardReader, dict[str, Any], dict[str, Any] | None]:
        """The reader of the shards, the facts, and this rank's generators: None when it is new to the checkpoint."""
        files = read_manifest(directory).files
        reader = ShardReader(directory, files, self.ranks)
        generator = _generator_file(self.ranks.rank)
        held = f"{STATE_DIRECTORY}/{generator}" in files
        generators = torch.load(reader.whole(generator), weights_only=True) if held else None
        return reader, json.load(reader.whole(FACTS_FILE)), generators

    def _agree(self, directory: Path, work: Callable[[], Result]) -> Result:
        """The result of `work` on this rank. Raises OperationRefused on all ranks when it fails on any of them."""
        results: list[Result] = []
        problems = [""]
        try:
            results.append(work())
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, GRPOError) as exception:
            problems = [str(damaged(directory, exception))]
        if self.ranks.world_size > 1:
            mine, problems = problems[0], [""] * self.ranks.world_size
            dist.all_gather_object(problems, mine, group=self.ranks.control)
        if text := "; ".join(dict.fromkeys(filter(None, problems))):
            raise OperationRefused(CheckpointDamagedError(text))
        return results[0]

    def _tensors(self) -> dict[str, Any]:
        """The live tensors by name: DCP reads them to save, and writes into them to load."""
        return {
            "model": {name: parameter.detach() for name, parameter in named_parameters(self.model)},
            "optimizer": self.optimizer.state(),
        }

    def _finish_earlier(self) -> None:
        if self._writing is not None:
            self._writing.join(self.timeout_seconds)
            if self._writing.is_alive():
                raise OperationRefused(
                    StalledError(f"the last checkpoint is still being written after {self.timeout_seconds} s")
                )

    def _write_rest(
        self, directory: Path, weights: WeightFiles, facts: dict[str, Any], generators: dict[str, Any]
    ) -> dict[str, str]:
        """What DCP did not write, and this rank's files sealed: path below `directory` -> "xxh3:HEX"."""
        rank, below, actor = self.ranks.rank, directory / STATE_DIRECTORY, directory / ACTOR_DIRECTORY
        for folder in (below, actor):
            make_directory(folder)
        with (below / _generator_file(rank)).open("wb") as file:
            torch.save(generators, file)
        mine = [*below.glob(f"__{rank}_*"), below / _generator_file(rank), *weights.write(actor)]
        if self.ranks.is_first:
            (below / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
            mine += [below / METADATA_FILE, below / FACTS_FILE]
            mine += write_beside_weights(actor, self.model.lm, weights.split, self.save_dtype, self.source)
        return {str(path.relative_to(directory)): seal(path) for path in sorted(mine)}

    def _conclude(self, error: str, files: dict[str, str], started: float) -> None:
        outcomes: list[Any] = [(error, files)]
        if self.ranks.world_size > 1:
            outcomes = [None] * self.ranks.world_size
            try:
                dist.all_gather_object(outcomes, (error, files), group=self.ranks.saving)
            except RuntimeError as exception:
                outcomes = [(error or f"another rank is gone: {root_cause(exception)}", {})]
        errors = [text for text, _ in outcomes if text]
        merged = {path: digest for _, part in outcomes for path, digest in part.items()}
        self._status = SaveStatusReply(
            done=True,
            error="; ".join(dict.fromkeys(errors)),
            files={} if errors else merged,
            seconds=time.perf_counter() - started,
        )
        if errors:
            log.error("checkpoint not written: %s", self._status.error)

    def _restore_generators(self, facts: dict[str, Any], generators: dict[str, Any] | None) -> None:
        if generators is not None:
            set_random_state(generators)
        else:
            seed_everything(self.seed + self.ranks.rank + 1_000_003 * facts["step"])
            log.warning("rank %d is new to this checkpoint (%d ranks): reseeded", self.ranks.rank, facts["world_size"])


def random_state() -> dict[str, Any]:
    """Every generator of this process, in types that torch.load takes with weights_only."""
    kind, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _generator_file(rank: int) -> str:
    return f"rng-rank-{rank}.pt"


def _write_error(directory: Path, step: int, exception: BaseException) -> str:
    """Path, reason and what to do. PyTorch's own words for a disk that is full name neither."""
    system = exception if isinstance(exception, OSError) else system_error(exception)
    if system is None and 0 <= free_bytes(directory) < NO_SPACE_BYTES:
        system = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    if system is not None:
        return str(as_storage_error(system, directory, f"saving step {step}"))
    return f"checkpoint.path: saving step {step} into {directory} failed: {root_cause(exception)}"
