"""Which processes a job has on this machine, and which GPUs, threads and ports each gets.

Invariant: a pure function of the document and of what the machine has. Trainer ranks take the first GPUs, engines the next ones; when
there are too few, they share (so one GPU runs a whole job, if memory allows). Colocated engines take the ranks' GPUs, in the ranks' order.
"""

import glob
import os
from dataclasses import dataclass

from grpo_worker.config import Spec
from grpo_worker.environment import REPLICA_INDEX, ROLLOUT_PORT
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
    if spec.weight_transport == "nccl" and 0 < len(gpus) < spec.devices:
        raise ConfigError(
            f"network.weightSync: nccl needs a GPU for each trainer rank and each engine's worker, {spec.devices} in all, and this machine "
            f"has {len(gpus)}: they would share, which NCCL cannot. Set it to store."
        )
    if spec.colocated and 0 < len(gpus) < spec.devices:
        raise ConfigError(
            f"placement: Colocated needs a GPU for each trainer rank, {spec.devices} in all, and this machine has {len(gpus)}. Lower "
            "trainer.gpusPerNode."
        )
    processes = [Process("coordinator", "coordinator", {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})]
    shared = _shared_environment(spec, machine)
    per_node = spec.trainer.gpus_per_node
    for node in range(spec.trainer.nodes):
        processes.append(_trainer(node, gpus, node * per_node, spec, shared))
    first = 0 if spec.colocated else spec.ranks
    return processes + [_engine(index, gpus, first, spec, shared) for index in range(spec.engines)]


def place_node(spec: Spec, machine: Machine, node: int, first_port: int) -> list[Process]:
    """Those of one node of a colocated job, whose machine or pod has its GPUs alone: its trainer and its engines. Raises ConfigError."""
    gpus = machine.gpus if spec.runtime.device != "cpu" else ()
    if 0 < len(gpus) < spec.trainer.gpus_per_node:
        raise ConfigError(
            f"trainer.gpusPerNode: {spec.trainer.gpus_per_node}, and this node gave {len(gpus)} GPUs to this process."
        )
    shared, count = _shared_environment(spec, machine), spec.engines_of_a_node
    engines = []
    for local in range(count):
        placed = _engine(local, gpus, 0, spec, shared)
        index = node * count + local
        environment = placed.environment | {
            REPLICA_INDEX: str(index),
            ROLLOUT_PORT: str(first_port and first_port + local),
        }
        engines.append(Process(f"rollout-{index}", "rollout", environment))
    return [_trainer(node, gpus, 0, spec, shared), *engines]


def _trainer(node: int, gpus: tuple[str, ...], first: int, spec: Spec, shared: dict[str, str]) -> Process:
    visible = _visible(gpus, range(first, first + spec.trainer.gpus_per_node))
    return Process(f"trainer-{node}", "trainer", {**shared, **visible, "NODE_RANK": str(node)})


def _engine(index: int, gpus: tuple[str, ...], first: int, spec: Spec, shared: dict[str, str]) -> Process:
    first += index * spec.rollout.tensor_parallel_size
    visible = _visible(gpus, range(first, first + spec.rollout.tensor_parallel_size))
    return Process(f"rollout-{index}", "rollout", {**shared, **visible, REPLICA_INDEX: str(index)})


def _shared_environment(spec: Spec, machine: Machine) -> dict[str, str]:
    # Idle threads sleep: processes that share cores would otherwise spin against each other (seen: a 20 times longer update).
    threads = _threads(spec, machine, spec.ranks, spec.engines)
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


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
