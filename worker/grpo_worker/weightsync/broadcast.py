"""The `nccl` and `ipc` transports: weights packed in buckets, from trainer rank 0 to every worker of every engine, or from each trainer rank to
the worker on its device.

Invariant: both ends cut the same list of tensors into the same buckets, and each makes the digest of the bytes that it has itself; so equal
digests mean equal weights. Nobody waits longer for another member than the group's patience. A group that failed is aborted and never used again.
"""

import math
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import msgspec
import torch
import torch.distributed as dist
import xxhash

from grpo_worker.errors import PeerLostError, one_line
from grpo_worker.protocol.messages import GroupPlace
from grpo_worker.weightsync.channels import Channel, Wait, connect
from grpo_worker.weightsync.manifest import TensorSpec, layout

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


def nothing() -> None:
    """There is nothing to wait for."""


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


def digest_of(
    tensors: Iterator[tuple[str, torch.Tensor]], specs: Sequence[TensorSpec], bucket_bytes: int, device: torch.device
) -> str:
    """What `WeightGroup.send` returns, where there is nobody to send to."""
    digest = WeightDigest()
    deque(_packed(tensors, specs, bucket_bytes, device, digest), maxlen=0)
    return digest.hexdigest()


def _packed(
    tensors: Iterator[tuple[str, torch.Tensor]],
    specs: Sequence[TensorSpec],
    bucket_bytes: int,
    device: torch.device,
    digest: WeightDigest,
) -> Iterator[torch.Tensor]:
    for bucket in buckets(specs, bucket_bytes):
        memory, views = _memory(bucket, device)
        for view, (_, tensor) in zip(views, tensors, strict=False):
            view.copy_(tensor)
        digest.add(bucket, memory)
        yield memory


def _memory(bucket: Sequence[TensorSpec], device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Whole rows of words, zero beside the tensors, and a view for each tensor."""
    offsets, size = layout(bucket)
    memory = torch.zeros(math.ceil(size / _ROW_BYTES) * _ROW_BYTES, dtype=torch.uint8, device=device)
    views = [
        memory[offset : offset + spec.size_bytes].view(getattr(torch, spec.dtype)).view(spec.shape)
        for spec, offset in zip(bucket, offsets, strict=True)
    ]
    return memory, views


class WeightGroup:
    """One member of a group. Used by one thread."""

    def __init__(self, place: GroupPlace, device: torch.device) -> None:
        """Meet the others. Raises WeightGroupError."""
        self.place, self._device = place, device
        self._channel: Channel | None = self._meet()

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]], specs: Sequence[TensorSpec]) -> str:
        """The tensors of `specs`, in their order. Returns the digest. Raises WeightGroupError; what is left of `tensors` was not taken."""
        digest = WeightDigest()
        under_way: Wait = nothing
        for memory in _packed(tensors, specs, self.place.bucket_bytes, self._device, digest):
            self._wait(under_way)  # one bucket was filled while the one before travelled
            under_way = self._pass_on(memory)
        self._wait(under_way)
        return digest.hexdigest()

    def receive(self, specs: Sequence[TensorSpec], digest: WeightDigest) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they come, each in memory that lasts as long as it is held. `digest` is complete after the last. Raises
        WeightGroupError."""
        for bucket in buckets(specs, self.place.bucket_bytes):
            memory, views = _memory(bucket, self._device)
            self._wait(self._pass_on(memory))
            digest.add(bucket, memory)
            yield from zip((spec.name for spec in bucket), views, strict=True)

    def close(self) -> None:
        """Leave at once; a member that still waits for us gets an error."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _pass_on(self, memory: torch.Tensor) -> Wait:
        assert self._channel is not None
        try:
            return self._channel.pass_on(memory)
        except RuntimeError as error:
            raise self._failed(one_line(error)) from error

    def _wait(self, wait: Wait) -> None:
        try:
            wait()
        except (RuntimeError, OSError) as error:
            raise self._failed(one_line(error)) from error

    def _failed(self, why: str) -> WeightGroupError:
        return WeightGroupError(
            f"weight group {self.place.generation} of {self.place.world_size} members failed: {why}"
        )

    def _meet(self) -> Channel:
        """NCCL's own set-up has no limit: it runs on a thread, which is left to itself when it takes too long."""
        done: Future[Channel] = Future()

        def work() -> None:
            try:
                done.set_result(connect(self.place, self._device))
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
