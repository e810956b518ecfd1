"""The group over NCCL, between two GPUs of one machine. Skipped with fewer."""

import time
from concurrent.futures import Future

import pytest
import torch
from test_broadcast import Tensors, receive, specs, start, tensors

from grpo_worker.protocol.messages import GroupPlace
from grpo_worker.weightsync.broadcast import WeightDigest, WeightGroup, WeightGroupError, open_meeting_point

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
MEETING_POINT = open_meeting_point("127.0.0.1") if torch.cuda.device_count() >= 2 else None


# More than NCCL itself has room for: a send that it can put away ends whether or not anybody takes it.
LARGE = {f"layers.{index}.weight": torch.zeros(1 << 24) for index in range(8)}


def member(generation: int, rank: int, patience_seconds: float = 60.0, bucket_bytes: int = 20_000) -> WeightGroup:
    assert MEETING_POINT is not None
    torch.cuda.set_device(rank)
    place = GroupPlace(
        host="127.0.0.1",
        port=MEETING_POINT.port,
        generation=generation,
        rank=rank,
        world_size=2,
        patience_seconds=patience_seconds,
        bucket_bytes=bucket_bytes,
    )
    return WeightGroup(place, torch.device("cuda", rank))


def on(device: str, of: Tensors) -> Tensors:
    return {name: tensor.to(device) for name, tensor in of.items()}


def test_every_member_has_what_was_sent_version_after_version_and_both_ends_digest_alike() -> None:
    def receiver() -> list[tuple[Tensors, str]]:
        group = member(1, 1)
        taken = [receive(group, specs(tensors())) for _ in range(2)]
        torch.cuda.synchronize()
        return taken

    receiving = start(receiver)
    group = member(1, 0)
    digests = [group.send(iter(on("cuda:0", tensors(seed)).items()), specs(tensors(seed))) for seed in (0, 1)]
    for seed, (got, digest) in enumerate(receiving.result(120)):
        assert digest == digests[seed]
        assert all(torch.equal(got[name].cpu(), tensor) for name, tensor in tensors(seed).items())
    group.close()


def test_a_receiver_that_stops_in_the_middle_fails_the_sender_within_its_patience_and_a_new_group_works() -> None:
    def stops() -> WeightGroup:
        group = member(2, 1, 3.0, bucket_bytes=1 << 26)
        next(group.receive(specs(LARGE), WeightDigest()))
        return group

    stopping: Future[WeightGroup] = start(stops)
    group, started = member(2, 0, 3.0, bucket_bytes=1 << 26), time.monotonic()
    with pytest.raises(WeightGroupError, match="weight group 2 of 2 members failed"):
        group.send(iter(on("cuda:0", LARGE).items()), specs(LARGE))
    assert time.monotonic() - started < 60
    group.close()
    stopping.result(60).close()

    receiving = start(lambda: receive(member(3, 1), specs(tensors())))
    group = member(3, 0)
    digest = group.send(iter(on("cuda:0", tensors()).items()), specs(tensors()))
    assert receiving.result(120)[1] == digest
    group.close()


def test_a_member_that_never_comes_is_waited_for_with_patience() -> None:
    started = time.monotonic()
    with pytest.raises(WeightGroupError, match="its members did not meet"):
        member(4, 0, 3.0)
    assert time.monotonic() - started < 60
