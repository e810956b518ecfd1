"""What a trainer rank lays into memory that it shares, the worker on its device has, bit for bit: the `ipc` transport, over files on CPU."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch
from test_broadcast import CPU, place, receive, specs, start, tensors

from grpo_worker.protocol.messages import GroupPlace
from grpo_worker.weightsync import channels
from grpo_worker.weightsync.broadcast import WeightDigest, WeightGroup, WeightGroupError

__all__ = ["place"]


@pytest.fixture
def pair(place: Callable[..., GroupPlace]) -> Callable[..., GroupPlace]:
    def of(generation: int, rank: int, pair: int = 0, **settings: float) -> GroupPlace:
        return msgspec.structs.replace(place(generation, rank, 2, **settings), pair=pair)

    return of


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 10_000, 64])
def test_each_pair_has_what_its_sender_sent_version_after_version(
    pair: Callable[..., GroupPlace], bucket_bytes: int
) -> None:
    generation = 200 + bucket_bytes

    def receiver(number: int) -> list[tuple[dict[str, torch.Tensor], str]]:
        group = WeightGroup(pair(generation, 1, number, bucket_bytes=bucket_bytes), CPU)
        return [receive(group, specs(tensors())) for _ in range(3)]

    def sender(number: int) -> list[str]:
        group = WeightGroup(pair(generation, 0, number, bucket_bytes=bucket_bytes), CPU)
        seeds = [10 * number + version for version in range(3)]
        return [group.send(iter(tensors(seed).items()), specs(tensors(seed))) for seed in seeds]

    receiving = [start(lambda n=n: receiver(n)) for n in range(2)]
    sending = [start(lambda n=n: sender(n)) for n in range(2)]
    for number in range(2):
        digests = sending[number].result(20)
        for version, (got, digest) in enumerate(receiving[number].result(20)):
            wanted = tensors(10 * number + version)
            assert digest == digests[version]
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


DEVICES = ["cuda" if torch.cuda.is_available() else "cpu"]
RECEIVER = """
    import sys, torch, msgspec
    from grpo_worker.protocol.messages import GroupPlace
    from grpo_worker.weightsync.broadcast import WeightDigest, WeightGroup
    from grpo_worker.weightsync.manifest import TensorSpec
    place = msgspec.json.decode(sys.argv[1], type=GroupPlace)
    specs = msgspec.json.decode(sys.argv[2], type=list[TensorSpec])
    group = WeightGroup(place, torch.device(sys.argv[3]))
    for version in range(2):
        digest = WeightDigest()
        total = sum(float(tensor.double().sum()) for _, tensor in group.receive(specs, digest))
        print(digest.hexdigest(), repr(total), flush=True)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_reads_the_same_bits(pair: Callable[..., GroupPlace], device: str) -> None:
    receiver, wanted = msgspec.json.encode(pair(301, 1)), msgspec.json.encode(specs(tensors()))
    arguments = [receiver.decode(), wanted.decode(), device]
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RECEIVER), *arguments], stdout=subprocess.PIPE, text=True
    )
    group = WeightGroup(pair(301, 0), torch.device(device))
    sent = [
        group.send(((name, tensor.to(device)) for name, tensor in tensors(seed).items()), specs(tensors(seed)))
        for seed in range(2)
    ]
    lines, _ = other.communicate(timeout=60)
    totals = [sum(float(tensor.double().sum()) for tensor in tensors(seed).values()) for seed in range(2)]
    assert [line.split() for line in lines.splitlines()] == [
        [digest, repr(total)] for digest, total in zip(sent, totals, strict=True)
    ]


def test_a_receiver_that_stops_taking_fails_its_sender_within_the_patience(pair: Callable[..., GroupPlace]) -> None:
    def one_bucket() -> None:
        next(WeightGroup(pair(302, 1), CPU).receive(specs(tensors()), WeightDigest()))

    receiving, started = start(one_bucket), time.monotonic()
    group = WeightGroup(pair(302, 0, patience_seconds=1.0), CPU)
    with pytest.raises(WeightGroupError, match="weight group 302 of 2 members failed"):
        group.send(iter(tensors().items()), specs(tensors()))
    receiving.result(20)
    assert time.monotonic() - started < 15


def test_a_sender_that_breaks_off_fails_its_receiver_within_the_patience(pair: Callable[..., GroupPlace]) -> None:
    receiving = start(lambda: receive(WeightGroup(pair(303, 1, patience_seconds=1.0), CPU), specs(tensors())))
    group = WeightGroup(pair(303, 0), CPU)

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tensors().items())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group.send(breaks_off(), specs(tensors()))
    with pytest.raises(WeightGroupError, match="weight group 303 of 2 members failed"):
        receiving.result(20)


def test_processes_on_two_devices_are_no_pair(pair: Callable[..., GroupPlace], monkeypatch: pytest.MonkeyPatch) -> None:
    devices = iter(["GPU a", "GPU b"])
    monkeypatch.setattr(channels, "physical", lambda device: next(devices))
    other = start(lambda: WeightGroup(pair(304, 1, patience_seconds=5.0), CPU))
    with pytest.raises(WeightGroupError, match=r"on different devices, GPU [ab] and GPU [ab]: shared memory needs one"):
        WeightGroup(pair(304, 0, patience_seconds=5.0), CPU)
    with pytest.raises(WeightGroupError, match="on different devices"):
        other.result(20)
