"""The trainer's side of colocated placement: what leaves the device while the engine works, and what each phase really took.

Invariant: off a GPU, and where engines have devices of their own, nothing here does anything.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo_worker.memory_plan import GIB, MemoryPlan, checked_plan
from grpo_worker.trainer.distributed import Ranks
from grpo_worker.trainer.optimizer import PolicyOptimizer
from grpo_worker.trainer.options import TrainerOptions

log = logging.getLogger(__name__)


class Turns:
    """Of one rank."""

    def __init__(self, options: TrainerOptions, ranks: Ranks) -> None:
        """Plan the device's memory. Raises ConfigError when the job does not fit."""
        self._active = options.spec.colocated and options.device == "cuda"
        self._device, self._syncing_bytes = ranks.device, 0
        self._plan: MemoryPlan | None = None
        if not self._active:
            return
        total = torch.cuda.get_device_properties(self._device).total_memory
        self._plan = checked_plan(options.spec, options.model_directory, total)
        if self._plan is None:
            log.info("no plan of the device's memory: no dense decoder with the usual names in its config.json")

    @property
    def moments_leave(self) -> bool:
        return self._plan is not None and self._plan.moments_leave

    @property
    def may_warm_up(self) -> bool:
        return not self._active or (self._plan is not None and self._plan.room_to_warm_up)

    def metrics(self) -> dict[str, float]:
        """GiB of the device in each phase: as planned, and as it was the last time. The update is just over, the engine sleeps."""
        if self._plan is None:
            return {}
        planned = {"generating": self._plan.generating, "updating": self._plan.updating, "syncing": self._plan.syncing}
        measured = {"updating": self._most(), "syncing": self._syncing_bytes}
        return {f"memory/{name}_planned_gib": phase.total / GIB for name, phase in planned.items()} | {
            f"memory/{name}_measured_gib": size / GIB for name, size in measured.items()
        }

    @contextmanager
    def handing_over(self, optimizer: PolicyOptimizer) -> Iterator[None]:
        """Around the hand-over of weights, which wakes the engine: leave it the room that it will take."""
        if not self._active:
            yield
            return
        if self.moments_leave:
            optimizer.rest()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self._syncing_bytes = self._most()
        torch.cuda.empty_cache()

    def _most(self) -> int:
        """What the device had at the most: our peak, and what others have now."""
        free, total = torch.cuda.mem_get_info(self._device)
        others = total - free - torch.cuda.memory_reserved(self._device)
        return others + torch.cuda.max_memory_reserved(self._device)
