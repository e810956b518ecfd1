"""What one member sends, all others have: over a real group, of Gloo."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from grpo_worker.protocol.messages import GroupPlace
from grpo_worker.weightsync.broadcast import WeightDigest, WeightGroup, WeightGroupError, buckets, open_meeting_point
from grpo_worker.weightsync.manifest import TensorSpec
from grpo_worker.weightsync.snapshot import dtype_name

CPU = torch.device("cpu")
T = TypeVar("T")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def place() -> Callable[..., GroupPlace]:
    """Places of one trainer's groups."""
    meeting_point = open_meeting_point("127.0.0.1")

    def place(
        generation: int, rank: int, world_size: int, patience_seconds: float = 20, bucket_bytes: int = 64
    ) -> GroupPlace:
        return GroupPlace(
            host="127.0.0.1",
            port=meeting_point.port,
            generation=generation,
            rank=rank,
            world_size=world_size,
            patience_seconds=patience_seconds,
            bucket_bytes=bucket_bytes,
        )

    return place


def tensors(seed: int = 0) -> Tensors:
    source = torch.Generator().manual_seed(seed)
    return {
        "embedding": torch.randn(50, 40, generator=source),
        "norm": torch.randn(7, generator=source).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "counts": torch.arange(5, dtype=torch.int32),
        "head": torch.randn(300, 40, generator=source).to(torch.bfloat16),
    }


def specs(of: Tensors) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in of.items()]


def start(work: Callable[[], T]) -> "Future[T]":
    return ThreadPoolExecutor(1).submit(work)


def receive(group: WeightGroup, wanted: list[TensorSpec]) -> tuple[Tensors, str]:
    digest = WeightDigest()
    return dict(group.receive(wanted, digest)), digest.hexdigest()


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 10_000, 64])
def test_every_member_has_what_was_sent_version_after_version(
    place: Callable[..., GroupPlace], bucket_bytes: int
) -> None:
    generation = 100 + bucket_bytes

    def member(rank: int) -> list[tuple[Tensors, str]]:
        group = WeightGroup(place(generation, rank, 3, bucket_bytes=bucket_bytes), CPU)
        try:
            return [receive(group, specs(tensors())) for _ in range(2)]
        finally:
            group.close()

    members = [start(lambda rank=rank: member(rank)) for rank in (1, 2)]
    group = WeightGroup(place(generation, 0, 3, bucket_bytes=bucket_bytes), CPU)
    digests = [group.send(iter(tensors(seed).items()), specs(tensors(seed))) for seed in (0, 1)]
    for one in members:
        for seed, (got, digest) in enumerate(one.result(20)):
            assert digest == digests[seed]
            assert got.keys() == tensors(seed).keys()
            assert all(torch.equal(got[name], tensor) for name, tensor in tensors(seed).items())
    assert digests[0] != digests[1]
    group.close()


def digest_of(of: Tensors) -> str:
    """Of one bucket."""
    digest, listed = WeightDigest(), specs(of)
    memory = torch.zeros(8192 * 16, dtype=torch.uint8)
    at = 0
    for tensor in of.values():
        flat = (
            tensor.contiguous().view(torch.uint8).reshape(-1) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        )
        memory[at : at + len(flat)] = flat
        at += len(flat)
    digest.add(listed, memory)
    return digest.hexdigest()


def test_the_digest_sees_a_bit_a_swap_and_a_name() -> None:
    words = {"a": torch.arange(4096, dtype=torch.int64)}
    one_bit, swapped, far = (words["a"].clone() for _ in range(3))
    one_bit[17] ^= 1
    swapped[[0, 1]] = swapped[[1, 0]]
    far[[5, 5 + 1024]] = far[[5 + 1024, 5]]  # same column
    renamed = {"b": words["a"]}
    all_of_them = [digest_of(one) for one in (words, {"a": one_bit}, {"a": swapped}, {"a": far}, renamed)]
    assert len(set(all_of_them)) == 5
    assert digest_of(words) == digest_of({"a": words["a"].clone()})


def test_neighbours_share_a_bucket_and_a_large_tensor_has_its_own() -> None:
    listed = [TensorSpec(name, (size,), "uint8") for name, size in (("a", 60), ("b", 60), ("big", 999), ("c", 1))]
    assert [[spec.name for spec in bucket] for bucket in buckets(listed, 128)] == [["a", "b"], ["big"], ["c"]]
    assert list(buckets([], 128)) == []


def test_who_does_not_come_is_waited_for_with_patience(place: Callable[..., GroupPlace]) -> None:
    started = time.monotonic()
    with pytest.raises(WeightGroupError, match="weight group 7 of 2 members failed: its members did not meet"):
        WeightGroup(place(7, 0, 2, patience_seconds=0.5), CPU)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("how", ["leaves", "sleeps"])
def test_a_receiver_that_is_lost_in_the_middle_fails_the_sender_and_the_others(
    place: Callable[..., GroupPlace], how: str
) -> None:
    generation, awake = 8 if how == "leaves" else 9, threading.Event()
    all_of_it, wanted = tensors(), specs(tensors())

    def lost() -> None:
        group = WeightGroup(place(generation, 2, 3, 1.0), CPU)
        next(group.receive(wanted, WeightDigest()))
        if how == "leaves":
            group.close()
        awake.wait(20)

    def other() -> tuple[Tensors, str]:
        return receive(WeightGroup(place(generation, 1, 3, 1.0), CPU), wanted)

    losing, healthy = start(lost), start(other)
    group = WeightGroup(place(generation, 0, 3, 1.0), CPU)

    def send_until_it_fails() -> None:
        while True:  # a broadcast of few bytes may leave before anybody takes it
            group.send(iter(all_of_it.items()), wanted)

    with pytest.raises(WeightGroupError, match=f"weight group {generation} of 3 members failed"):
        send_until_it_fails()
    group.close()
    try:  # it may have had all of the version by then
        assert all(torch.equal(tensor, all_of_it[name]) for name, tensor in healthy.result(20)[0].items())
    except WeightGroupError:
        pass
    awake.set()
    losing.result(20)


def test_a_sender_that_is_lost_fails_the_receivers(place: Callable[..., GroupPlace]) -> None:
    wanted = specs(tensors())
    receiving = start(lambda: receive(WeightGroup(place(10, 1, 2, 5.0), CPU), wanted))
    group = WeightGroup(place(10, 0, 2, 5.0), CPU)

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tensors().items())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group.send(breaks_off(), wanted)
    group.close()
    with pytest.raises(WeightGroupError):
        receiving.result(20)


def test_the_meeting_point_listens_where_it_is_told_to_and_nowhere_else() -> None:
    meeting_point = open_meeting_point("127.0.0.2")
    socket.create_connection(("127.0.0.2", meeting_point.port), 5).close()
    for elsewhere in ("127.0.0.1", "::1"):
        with pytest.raises(OSError, match=r"refused|ddress"):
            socket.create_connection((elsewhere, meeting_point.port), 5)
    everywhere = open_meeting_point("0.0.0.0")
    socket.create_connection(("127.0.0.3", everywhere.port), 5).close()
