"""The ranks of one trainer: rendezvous, device, seeds and the channel that commands travel on.

Invariant: gradients and weights move on the device's backend (NCCL on CUDA), commands and results on a Gloo group of
their own, checkpoint traffic on a third; so none ever waits behind, or is mistaken for, another.
"""

import os
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from grpo_worker.errors import ConfigError, RetryableError, one_line

ERROR_KEY = "trainer/error"
TERMINATING_KEY = "trainer/terminating"
LOADED_KEY = "trainer/loaded"


@dataclass(frozen=True)
class Ranks:
    """This process's place. `store` is shared by all ranks; `control` and `saving` are Gloo groups of all ranks.

    `mesh` is [replicate, shard] where groups of ranks hold copies of the model (HSDP), else [shard].
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup
    saving: dist.ProcessGroup
    store: dist.Store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Copies of the model, each cut over `world_size / replicas` ranks."""
        return self.mesh.size() // self.mesh["shard"].size()


def join(
    device: str,
    timeout_seconds: float,
    seed: int,
    rendezvous_timeout_seconds: float | None = None,
    shard_size: int = -1,
) -> Ranks:
    """Meet the other ranks as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say (alone without them).

    Args:
        timeout_seconds: limit of one collective.
        rendezvous_timeout_seconds: until all ranks have come (default the same); a name that does not resolve yet is tried again.
        shard_size: see `make_mesh`.

    Raises ConfigError when the port is taken or there is no such GPU, RetryableError when the others do not come.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = _device(device, local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    store = _rendezvous(rank, world_size, timedelta(seconds=rendezvous_timeout_seconds or timeout_seconds))
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    saving = dist.new_group(backend="gloo", timeout=timeout)
    mesh = make_mesh(place.type, world_size, shard_size)
    seed_everything(seed + rank)
    if place.type == "cpu":
        torch.use_deterministic_algorithms(True)
    return Ranks(rank, world_size, place, mesh, control, saving, store)


def make_mesh(device_type: str, world_size: int, shard_size: int) -> DeviceMesh:
    """Neighbouring ranks, `shard_size` of them (-1: all), share one copy of the model; so a copy stays within a node whose ranks it divides."""
    if shard_size in (-1, world_size):
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def meet(ranks: Ranks, timeout_seconds: float) -> None:
    """Until every rank has come here, whatever the limit of a collective is: ranks load at the speed of their storage.

    Raises RetryableError that names the ranks that did not come.
    """
    if ranks.world_size == 1:
        return
    keys = [f"{LOADED_KEY}/{rank}" for rank in range(ranks.world_size)]
    try:
        ranks.store.set(keys[ranks.rank], b"")  # type: ignore[arg-type]
        ranks.store.wait(keys, timedelta(seconds=timeout_seconds))
    except (RuntimeError, dist.DistError) as error:
        try:
            missing = [str(rank) for rank, key in enumerate(keys) if not ranks.store.check([key])]
        except (RuntimeError, dist.DistError):
            raise RetryableError(
                f"rank 0 is gone, while rank {ranks.rank} waited for all to load: {one_line(error)}"
            ) from error
        raise RetryableError(
            f"rank {', '.join(missing)} of {ranks.world_size} had not loaded the model {timeout_seconds:.0f} s after rank "
            f"{ranks.rank}. Look at the log and the storage of that node, or raise failurePolicy.startupTimeoutSeconds."
        ) from error


def open_store(ranks: Ranks) -> dist.Store:
    """A connection of its own to the shared store, for another thread (one connection serves one thread)."""
    if ranks.world_size == 1:
        return ranks.store
    return dist.TCPStore(_store_host(ranks.rank), int(os.environ["MASTER_PORT"]), is_master=False)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def broadcast_bytes(payload: bytes | None, ranks: Ranks) -> bytes:
    """Rank 0's `payload` on every rank."""
    if ranks.world_size == 1:
        assert payload is not None
        return payload
    length = torch.tensor([len(payload) if payload is not None else 0], dtype=torch.int64)
    dist.broadcast(length, src=0, group=ranks.control)
    body = torch.empty(int(length), dtype=torch.uint8)
    if payload:
        body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    if len(body):
        dist.broadcast(body, src=0, group=ranks.control)
    return body.numpy().tobytes()


def sum_over_ranks(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """In place, on the CPU."""
    if ranks.world_size > 1:
        dist.all_reduce(values, group=ranks.control)
    return values


def sum_dicts_over_ranks(values: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """A name that some ranks do not have counts as zero there."""
    if ranks.world_size == 1:
        return values
    everyone: list[dict[str, float] | None] = [None] * ranks.world_size
    dist.all_gather_object(everyone, values, group=ranks.control)
    present = [part for part in everyone if part is not None]
    names = sorted({name for part in present for name in part})
    return {name: sum(part.get(name, 0.0) for part in present) for name in names}


def max_over_ranks(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """In place, on the CPU."""
    if ranks.world_size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=ranks.control)
    return values


def _device(device: str, local_rank: int) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"trainer.gpusPerNode: local rank {local_rank} has no GPU, {torch.cuda.device_count()} are visible. "
            "Lower gpusPerNode, or look at CUDA_VISIBLE_DEVICES."
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def _store_host(rank: int) -> str:
    """Rank 0 keeps the store, and reaches it whether or not its own name is in DNS yet."""
    return "localhost" if rank == 0 else os.environ["MASTER_ADDR"]


def _rendezvous(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    if world_size == 1:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(_store_host(rank), port, world_size, is_master=rank == 0, timeout=timeout)
    except dist.DistNetworkError as error:
        if rank == 0:
            raise ConfigError(f"network.rendezvousPort: {address}:{port} cannot be used: {one_line(error)}") from error
        raise RetryableError(f"rank {rank} did not reach rank 0 at {address}:{port}: {one_line(error)}") from error
    except dist.DistError as error:
        raise RetryableError(f"the ranks did not meet at {address}:{port}: {one_line(error)}") from error
