"""Saving and loading of the trainer's part of a checkpoint: `actor/` (Hugging Face format) and `state/` (DCP shards).

Invariants: `save` returns when the state is copied to host memory; what is written later is that copy, whatever the
training does. A write that fails is reported, with path and reason, and stops nothing. `load` restores bit for bit on
the same number of ranks; on another number DCP reshards the tensors and the random generators of new ranks are seeded
anew.
"""

import errno
import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from grpo_worker.errors import StalledError
from grpo_worker.protocol.messages import SaveStatusReply
from grpo_worker.trainer.distributed import Ranks, seed_everything
from grpo_worker.trainer.failures import OperationRefused, damaged, root_cause
from grpo_worker.trainer.hf_format import write_model
from grpo_worker.trainer.model import PolicyModel, named_parameters
from grpo_worker.trainer.optimizer import PolicyOptimizer
from grpo_worker.trainer.publish import whole_state
from grpo_worker.trainer.update import TrainerState, release_gathered

STATE_DIRECTORY, ACTOR_DIRECTORY = "state", "actor"
FACTS_FILE = "trainer.json"
FILE_MODE, DIRECTORY_MODE = 0o640, 0o750  # at least: a reader of the same group is served whatever the umask was
HASH_CHUNK_BYTES = 1 << 24
NO_SPACE_BYTES = 1 << 24

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
        whole = whole_state(self.model, self.save_dtype, self.ranks)
        facts = {**asdict(state), "world_size": self.ranks.world_size, "torch": torch.__version__}
        generators = random_state()
        self._status = SaveStatusReply(done=False)
        future: Any = dcp.async_save(
            self._tensors(),
            storage_writer=_ShardWriter(directory / STATE_DIRECTORY, thread_count=1),
            process_group=self.ranks.saving,
        )

        def write() -> None:
            error = ""
            try:
                getattr(future, "upload_completion", future).result(self.timeout_seconds)
                self._write_rest(directory, whole, facts, generators)
                files = self._hash_files(directory)
            except (
                Exception,
                CheckpointException,
            ) as exception:  # disk full, read-only, vanished: all reach the coordinator as text
                error, files = _write_error(directory, exception), {}
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
        """Restore from `directory`. Collective. Raises CheckpointDamagedError."""
        self._finish_earlier()
        below = directory / STATE_DIRECTORY
        try:
            facts = json.loads((below / FACTS_FILE).read_text())
            dcp.load(
                self._tensors(),
                storage_reader=dcp.FileSystemReader(below),
                process_group=self.ranks.control,
            )
            state = TrainerState(facts["step"], facts["updates"], facts["skipped_updates"])
            self._restore_generators(below, facts)
        except (OSError, ValueError, KeyError, RuntimeError, CheckpointException) as exception:
            raise damaged(str(directory), exception) from exception
        release_gathered(self.model)
        return state

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
        self, directory: Path, whole: dict[str, Tensor] | None, facts: dict[str, Any], generators: dict[str, Any]
    ) -> None:
        below = directory / STATE_DIRECTORY
        with (below / _generator_file(self.ranks.rank)).open("wb") as file:
            torch.save(generators, file)
        if whole is not None:
            (below / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
            write_model(directory / ACTOR_DIRECTORY, self.model.lm, whole, self.save_dtype, self.source)

    def _hash_files(self, directory: Path) -> dict[str, str]:
        """This rank's files, made durable and readable: path below `directory` -> "xxh3:HEX"."""
        rank, below = self.ranks.rank, directory / STATE_DIRECTORY
        mine = [*below.glob(f"__{rank}_*"), below / _generator_file(rank)]
        if self.ranks.is_first:
            actor = directory / ACTOR_DIRECTORY
            mine += [below / ".metadata", below / FACTS_FILE, *(path for path in actor.rglob("*") if path.is_file())]
            for folder in (directory, below, actor):
                os.chmod(folder, folder.stat().st_mode | DIRECTORY_MODE)
        return {str(path.relative_to(directory)): _seal(path) for path in sorted(mine)}

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

    def _restore_generators(self, below: Path, facts: dict[str, Any]) -> None:
        file = below / _generator_file(self.ranks.rank)
        if file.exists():
            set_random_state(torch.load(file, weights_only=True))
        else:
            seed_everything(self.seed + self.ranks.rank + 1_000_003 * facts["step"])
            log.warning("rank %d is new to this checkpoint (%d ranks): reseeded", self.ranks.rank, facts["world_size"])


class _ShardWriter(dcp.FileSystemWriter):
    """Tells why a write failed: on its way between ranks an exception loses what it was raised from."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as exception:
            if system := _system_error(exception):
                raise OSError(system.errno, system.strerror, str(self.path)) from exception
            raise


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


def _seal(path: Path) -> str:
    """Hash, widen the mode, flush to disk."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
        os.fsync(file.fileno())
    os.chmod(path, path.stat().st_mode | FILE_MODE)
    return f"xxh3:{digest.hexdigest()}"


def _chunks(file: Any) -> Iterable[bytes]:
    while chunk := file.read(HASH_CHUNK_BYTES):
        yield chunk


def _write_error(directory: Path, exception: BaseException) -> str:
    """Path and reason. PyTorch's file writer covers the system's error with one of its own; it is found beneath."""
    system = exception if isinstance(exception, OSError) else _system_error(exception)
    if system is not None and system.strerror:
        return f"{system.filename or directory}: {system.strerror} (errno {system.errno})"
    free = _free_bytes(directory)
    hint = f" ({os.strerror(errno.ENOSPC)}: {free} bytes are free)" if 0 <= free < NO_SPACE_BYTES else ""
    return f"{directory}: {root_cause(exception)}{hint}"


def _system_error(exception: BaseException | None) -> OSError | None:
    seen: set[int] = set()
    while exception is not None and id(exception) not in seen:
        seen.add(id(exception))
        failures = getattr(exception, "failures", None)
        wrapped = next(iter(failures.values()), None) if isinstance(failures, dict) else None
        inner = wrapped[0] if isinstance(wrapped, tuple) else None
        if isinstance(inner, BaseException) and (found := _system_error(inner)):
            return found
        if isinstance(exception, OSError):
            return exception
        exception = exception.__cause__ or exception.__context__
    return None


def _free_bytes(directory: Path) -> int:
    """-1 when nobody knows."""
    existing = next((path for path in (directory, *directory.parents) if path.is_dir()), None)
    return shutil.disk_usage(existing).free if existing else -1
