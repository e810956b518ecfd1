"""What a bucket of weights travels by: a collective between devices, or memory that two processes share.

Invariant: when the wait for a bucket is over, the receiver's memory has what the sender's had. Nobody waits longer than the place's patience.
"""

import mmap
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist

from grpo_worker.protocol.messages import GroupPlace
from grpo_worker.weightsync.host_memory import HostMemory

SENDER = 0  # the trainer, in every group
CPU = "cpu"  # the device of whoever has no GPU
POLL_SECONDS = 0.0005

Wait = Callable[[], None]  # raises RuntimeError


class Channel(Protocol):
    """One end of a group that has met."""

    def pass_on(self, memory: torch.Tensor) -> Wait:
        """Begin to send `memory`, uint8, or to fill it. It belongs to the channel until the wait is over."""

    def close(self) -> None: ...


def connect(place: GroupPlace, device: torch.device) -> Channel:
    """Meet the others. Raises RuntimeError. NCCL's own set-up has no limit."""
    patience = timedelta(seconds=place.patience_seconds)
    meeting_point = dist.TCPStore(place.host, place.port, is_master=False, wait_for_workers=False, timeout=patience)
    store = dist.PrefixStore(f"weights/{place.generation}", meeting_point)
    if place.pair is None:
        return Collective(store, place, device)
    return SharedMemory(dist.PrefixStore(str(place.pair), store), place, device)


class Collective:
    """NCCL on GPUs, Gloo on CPU."""

    def __init__(self, store: dist.Store, place: GroupPlace, device: torch.device) -> None:
        self._device, self._patience = device, place.patience_seconds
        if device.type == "cpu":
            patience = timedelta(seconds=self._patience)
            self._group: Any = dist.ProcessGroupGloo(store, place.rank, place.world_size, patience)
        else:
            torch.cuda.set_device(device)
            self._group = dist.ProcessGroupNCCL(store, place.rank, place.world_size, dist.ProcessGroupNCCL.Options())
        hello = torch.zeros(1, device=device)
        self._group.broadcast(hello, SENDER).wait()  # NCCL connects at its first collective
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def pass_on(self, memory: torch.Tensor) -> Wait:
        work = self._group.broadcast(memory, SENDER)
        return lambda: self._wait(work)

    def close(self) -> None:
        """A member that still waits for us gets an error."""
        self._group.abort()

    def _wait(self, work: Any) -> None:
        if self._device.type == "cpu":
            work.wait(timedelta(seconds=self._patience))
            return
        # On a GPU `wait` only orders streams, and who then needs the result would wait for ever for a member that is gone.
        deadline = time.monotonic() + self._patience
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing came for {self._patience:.0f} s")
            time.sleep(POLL_SECONDS)
        work.wait()


class SharedMemory:
    """The `ipc` transport between a trainer rank and the engine's worker on the same device: one buffer of the sender's, mapped by the receiver
    (CUDA IPC; on CPU a file without a name), and a word of the group's store for each bucket that lies in it or was taken out.

    CUDA IPC needs both processes in one PID namespace, so in one container.
    """

    def __init__(self, store: dist.Store, place: GroupPlace, device: torch.device) -> None:
        self._store, self._device = store, device
        self._patience = timedelta(seconds=place.patience_seconds)
        self._sends = place.rank == SENDER
        self._count = 0
        self._buffer: torch.Tensor | None = None
        self._memory: HostMemory | None = None  # behind the sender's buffer on CPU
        self._handle = b""
        own = physical(device)
        self._put("sender" if self._sends else "receiver", own.encode())
        other = self._get("receiver" if self._sends else "sender").decode()
        if other != own:
            raise RuntimeError(f"they are on different devices, {own} and {other}: shared memory needs one")

    def pass_on(self, memory: torch.Tensor) -> Wait:
        self._count += 1
        put, taken = f"put/{self._count}", f"taken/{self._count}"
        if self._sends:
            self._room(len(memory))[: len(memory)].copy_(memory)
            self._synchronize()
            self._put(put, self._handle)

            def wait() -> None:
                self._done(taken)

            return wait

        def take() -> None:
            memory.copy_(self._mapped(self._done(put))[: len(memory)])
            self._synchronize()
            self._put(taken, b"")

        return take

    def close(self) -> None:
        self._buffer = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _room(self, size: int) -> torch.Tensor:
        """The sender's buffer, of at least `size` bytes."""
        if self._buffer is None or len(self._buffer) < size:
            self.close()
            self._buffer, self._memory, handle = _share(size, self._device)
            self._handle = msgspec.msgpack.encode(handle)
        return self._buffer

    def _mapped(self, handle: bytes) -> torch.Tensor:
        if self._buffer is None or handle != self._handle:
            self._buffer = None
            self._buffer, self._handle = _open(msgspec.msgpack.decode(handle, type=Handle), self._device), handle
        return self._buffer

    def _put(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]

    def _get(self, key: str) -> bytes:
        self._store.wait([key], self._patience)
        return bytes(self._store.get(key))

    def _done(self, key: str) -> bytes:
        """Wait for a word, and take it away."""
        value = self._get(key)
        self._store.delete_key(key)
        return value

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """Of shared memory, for another process: a path, or what `torch.UntypedStorage._share_cuda_` gives."""

    size_bytes: int
    path: str = ""
    cuda: bytes = b""
    storage_bytes: int = 0
    offset_bytes: int = 0
    counter: bytes = b""  # who still maps it
    counter_offset: int = 0
    event: bytes = b""
    event_sync: bool = False


def physical(device: torch.device) -> str:
    """Which device it is, whatever number this process has given it."""
    return CPU if device.type == "cpu" else f"GPU {torch.cuda.get_device_properties(device).uuid}"


def _share(size: int, device: torch.device) -> tuple[torch.Tensor, HostMemory | None, Handle]:
    """A buffer, the memory that it is on CPU, and its handle for others."""
    if device.type == "cpu":
        memory = HostMemory()
        return _tensor(memory.reserve(size), size), memory, Handle(size_bytes=size, path=memory.path)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    _, cuda, storage_bytes, offset, counter, counter_offset, event, event_sync = buffer.untyped_storage()._share_cuda_()
    return buffer, None, Handle(
        size_bytes=size, cuda=cuda, storage_bytes=storage_bytes, offset_bytes=offset, counter=counter,
        counter_offset=counter_offset, event=event, event_sync=event_sync,
    )  # fmt: skip


def _open(handle: Handle, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        with open(handle.path, "r+b") as file:
            return _tensor(mmap.mmap(file.fileno(), handle.size_bytes), handle.size_bytes)
    storage = torch.UntypedStorage._new_shared_cuda(
        torch.device("cuda", device.index or 0).index, handle.cuda, handle.storage_bytes, handle.offset_bytes, handle.counter,
        handle.counter_offset, handle.event, handle.event_sync,
    )  # fmt: skip
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (handle.size_bytes,), (1,))


def _tensor(memory: mmap.mmap | memoryview, size: int) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8, count=size)
