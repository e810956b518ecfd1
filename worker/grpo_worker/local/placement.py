"""Which processes a job has on this machine, and which GPUs, threads and ports each gets.

Invariant: a pure function of the document and of what the machine has. Trainer ranks take the first GPUs, engines the next ones; when
there are too few, they share (so one GPU runs a whole job, if memory allows).
"""

import glob
import os
from dataclasses import dataclass

from grpo_worker.config import Spec
from grpo_worker.environment import REPLICA_INDEX
from grpo_worker.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """What there is to place on."""

    cores: int
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them

    @classmethod
    def here(cls) -> "Machine":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            gpus = tuple(name.strip() for name in visible.split(",") if name.strip())
        else:
            gpus = tuple(str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*"))))
        return cls(len(os.sched_getaffinity(0)), gpus)


@dataclass(frozen=True)
class Process:
    """One child: its name, role, and what its environment adds."""

    name: str
    role: str
    environment: dict[str, str]


def place(spec: Spec, machine: Machine) -> list[Process]:
    """All processes of the job. Raises ConfigError when the document asks for a GPU and there is none."""
    device = spec.runtime.device
    if device == "cuda" and not machine.gpus:
        raise ConfigError("runtime.device: cuda, but this machine has no GPU. Set it to auto or cpu.")
    gpus = machine.gpus if device != "cpu" else ()
    if spec.network.weight_sync == "nccl" and 0 < len(gpus) < spec.devices:
        raise ConfigError(
            f"network.weightSync: nccl needs a GPU for each trainer rank and each engine's worker, {spec.devices} in all, and this machine "
            f"has {len(gpus)}: they would share, which NCCL cannot. Set it to store."
        )
    ranks, engines = spec.trainer.nodes * spec.trainer.gpus_per_node, spec.rollout.replicas
    # Idle threads sleep: processes that share cores would otherwise spin against each other (seen: a 20 times longer update).
    threads = {"OMP_NUM_THREADS": str(_threads(spec, machine, ranks, engines)), "OMP_WAIT_POLICY": "PASSIVE"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    processes = [Process("coordinator", "coordinator", {"OMP_NUM_THREADS": "1", **hidden})]
    for node in range(spec.trainer.nodes):
        first = node * spec.trainer.gpus_per_node
        visible = _visible(gpus, range(first, first + spec.trainer.gpus_per_node))
        processes.append(Process(f"trainer-{node}", "trainer", {**threads, **visible, "NODE_RANK": str(node)}))
    for index in range(engines):
        first = ranks + index * spec.rollout.tensor_parallel_size
        visible = _visible(gpus, range(first, first + spec.rollout.tensor_parallel_size))
        processes.append(Process(f"rollout-{index}", "rollout", {**threads, **visible, REPLICA_INDEX: str(index)}))
    return processes


def device_count(spec: Spec, machine: Machine) -> int:
    """GPUs that the job uses (on CPU: its processes that compute), each counted once."""
    return spec.devices if spec.runtime.device == "cpu" or not machine.gpus else min(spec.devices, len(machine.gpus))


def _visible(gpus: tuple[str, ...], indices: range) -> dict[str, str]:
    if not gpus:
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(gpus[index % len(gpus)] for index in indices))}


def _threads(spec: Spec, machine: Machine, ranks: int, engines: int) -> int:
    """Threads of each trainer rank and engine on CPU."""
    if spec.runtime.cpu_threads:
        return spec.runtime.cpu_threads
    # On-policy, trainer and engines take turns; overlapped, they run at the same time.
    at_once = max(ranks, engines) if spec.rollout.max_staleness == 0 else ranks + engines
    return max(1, machine.cores // at_once)
