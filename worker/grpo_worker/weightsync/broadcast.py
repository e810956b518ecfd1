"""The `nccl` transport: trainer rank 0 broadcasts the weights, packed in buckets, to every worker of every engine.

Invariant: both ends cut the same list of tensors into the same buckets, and each makes the digest of the bytes that it has itself; so equal
digests mean equal weights. Nobody waits longer for another member than the group's patience. A group that failed is aborted and never used again.
"""

import math
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import xxhash

from grpo_worker.errors import PeerLostError, one_line
from grpo_worker.protocol.messages import GroupPlace
from grpo_worker.weightsync.manifest import TensorSpec, layout

SENDER = 0  # the trainer's rank 0, in every group
POLL_SECONDS = 0.0005
_ROW_BYTES = 8192  # of a bucket as a matrix of 64-bit words, whose sums of rows and of columns are its checksum


class WeightGroupError(PeerLostError):
    """A member was lost, or did not keep up: the version goes by `store`."""

    reason = "WeightGroup"


def open_meeting_point(host: str) -> dist.TCPStore:
    """On the trainer's rank 0, for its life: where the members of each group find each other. Left to itself it would listen on all
    addresses, not on `host` alone."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def buckets(specs: Iterable[TensorSpec], limit_bytes: int) -> Iterator[list[TensorSpec]]:
    """Neighbours together, as many as fit; a larger tensor alone."""
    bucket: list[TensorSpec] = []
    for spec in specs:
        if bucket and layout([*bucket, spec])[1] > limit_bytes:
            yield bucket
            bucket = []
        bucket.append(spec)
    if bucket:
        yield bucket


class WeightDigest:
    """Of the buckets' bytes, where they are. A sum over the rows and one over the columns see any changed word, and words that changed places."""

    def __init__(self) -> None:
        self._specs: list[TensorSpec] = []
        self._sums: list[torch.Tensor] = []

    def add(self, specs: Sequence[TensorSpec], memory: torch.Tensor) -> None:
        """`memory`: uint8 [whole rows of words], zero where no tensor lies."""
        words = memory.view(torch.int64).view(-1, _ROW_BYTES // 8)
        self._specs += specs
        self._sums += [words.sum(0), words.sum(1)]

    def hexdigest(self) -> str:
        hasher = xxhash.xxh3_128(msgspec.msgpack.encode(self._specs))
        for sums in self._sums:
            hasher.update(sums.cpu().numpy().data)
        return hasher.hexdigest()


class WeightGroup:
    """One member of a group: NCCL on GPUs, Gloo on CPU. Used by one thread."""

    def __init__(self, place: GroupPlace, device: torch.device) -> None:
        """Meet the others. Raises WeightGroupError."""
        self.place, self._device = place, device
        self._group = self._meet()

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]], specs: Sequence[TensorSpec]) -> str:
        """The tensors of `specs`, in their order. Returns the digest. Raises WeightGroupError; what is left of `tensors` was not taken."""
        digest = WeightDigest()
        under_way: Any = None
        for bucket in buckets(specs, self.place.bucket_bytes):
            memory, views = self._memory(bucket)
            # One bucket is filled while the one before travels.
            for view, (_, tensor) in zip(views, tensors, strict=False):
                view.copy_(tensor)
            digest.add(bucket, memory)
            self._wait(under_way)
            under_way = self._broadcast(memory)
        self._wait(under_way)
        return digest.hexdigest()

    def receive(self, specs: Sequence[TensorSpec], digest: WeightDigest) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they come, each in memory that lasts as long as it is held. `digest` is complete after the last. Raises
        WeightGroupError."""
        for bucket in buckets(specs, self.place.bucket_bytes):
            memory, views = self._memory(bucket)
            self._wait(self._broadcast(memory))
            digest.add(bucket, memory)
            yield from zip((spec.name for spec in bucket), views, strict=True)

    def close(self) -> None:
        """Leave at once; a member that still waits for us gets an error."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _memory(self, bucket: Sequence[TensorSpec]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Whole rows of words, zero beside the tensors, and a view for each tensor."""
        offsets, size = layout(bucket)
        memory = torch.zeros(math.ceil(size / _ROW_BYTES) * _ROW_BYTES, dtype=torch.uint8, device=self._device)
        views = [
            memory[offset : offset + spec.size_bytes].view(getattr(torch, spec.dtype)).view(spec.shape)
            for spec, offset in zip(bucket, offsets, strict=True)
        ]
        return memory, views

    def _broadcast(self, memory: torch.Tensor) -> Any:
        try:
            return self._group.broadcast(memory, SENDER)
        except RuntimeError as error:
            raise self._failed(one_line(error)) from error

    def _wait(self, work: Any) -> None:
        if work is None:
            return
        try:
            if self._device.type == "cpu":
                work.wait(timedelta(seconds=self.place.patience_seconds))
                return
            # On a GPU `wait` only orders streams, and who then needs the result would wait for ever for a member that is gone.
            deadline = time.monotonic() + self.place.patience_seconds
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise self._failed(f"nothing came for {self.place.patience_seconds:.0f} s")
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            raise self._failed(one_line(error)) from error

    def _failed(self, why: str) -> WeightGroupError:
        return WeightGroupError(
            f"weight group {self.place.generation} of {self.place.world_size} members failed: {why}"
        )

    def _meet(self) -> Any:
        """NCCL's own set-up has no limit: it runs on a thread, which is left to itself when it takes too long."""
        done: Future[Any] = Future()

        def work() -> None:
            try:
                done.set_result(_connect(self.place, self._device))
            except Exception as error:
                done.set_exception(error)

        threading.Thread(target=work, name="weight-group", daemon=True).start()
        try:
            return done.result(self.place.patience_seconds)
        except (TimeoutError, RuntimeError, dist.DistError) as error:
            raise self._failed(f"its members did not meet: {one_line(error) or 'not in time'}") from error


class GroupMember:
    """A process's seat over versions: the group lasts until another place is asked for, or its use fails."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: WeightGroup | None = None

    @contextmanager
    def at(self, place: GroupPlace) -> Iterator[WeightGroup]:
        """The group of this place. Raises WeightGroupError."""
        if self._group is None or self._group.place != place:
            self.leave()
            self._group = WeightGroup(place, self._device)
        try:
            yield self._group
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()


def _connect(place: GroupPlace, device: torch.device) -> Any:
    left = timedelta(seconds=place.patience_seconds)
    meeting_point = dist.TCPStore(place.host, place.port, is_master=False, wait_for_workers=False, timeout=left)
    store = dist.PrefixStore(f"weights/{place.generation}", meeting_point)
    if device.type == "cpu":
        group: Any = dist.ProcessGroupGloo(store, place.rank, place.world_size, left)
    else:
        torch.cuda.set_device(device)
        group = dist.ProcessGroupNCCL(store, place.rank, place.world_size, dist.ProcessGroupNCCL.Options())
    hello = torch.zeros(1, device=device)
    group.broadcast(hello, SENDER).wait()  # NCCL connects at its first collective
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return group
