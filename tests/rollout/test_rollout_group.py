"""Weights over a group: the engine that served a version from the store takes the next ones from the trainer's broadcast."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from replica_helpers import Replica, Trainer, weights
from test_rollout_engine import assert_serves, sync

from grpo_worker.protocol import codec
from grpo_worker.protocol.messages import ApplyWeightsReply, ApplyWeightsRequest, ErrorReply, GroupPlace
from grpo_worker.weightsync.broadcast import WeightGroup, open_meeting_point
from grpo_worker.weightsync.manifest import TensorSpec
from grpo_worker.weightsync.snapshot import dtype_name

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
BUCKET_BYTES = 20_000  # several buckets, and the embedding alone in one


class Broadcaster:
    """The trainer's end of its groups."""

    def __init__(self) -> None:
        self._meeting_point = open_meeting_point("127.0.0.1")
        self._thread = ThreadPoolExecutor(1)
        self.group: WeightGroup | None = None

    def place(self, generation: int, rank: int) -> GroupPlace:
        return GroupPlace(
            host="127.0.0.1",
            port=self._meeting_point.port,
            generation=generation,
            rank=rank,
            world_size=2,
            patience_seconds=3.0,
            bucket_bytes=BUCKET_BYTES,
        )

    def send(self, generation: int, tensors: Tensors, count: int = 1000) -> "Future[str]":
        """The digest; after `count` tensors the process is gone."""
        listed = [TensorSpec(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()]

        def some() -> Iterator[tuple[str, torch.Tensor]]:
            yield from list(tensors.items())[:count]
            if count < len(tensors):
                raise KeyboardInterrupt

        def work() -> str:
            if self.group is None or self.group.place.generation != generation:
                self.group = WeightGroup(self.place(generation, 0), CPU)
            try:
                return self.group.send(some(), listed)
            except BaseException:
                self.group.close()
                self.group = None
                raise

        return self._thread.submit(work)


@pytest.fixture(scope="module")
def broadcaster() -> Broadcaster:
    return Broadcaster()


def take(replica: Replica, broadcaster: Broadcaster, version: int, generation: int) -> ApplyWeightsReply | ErrorReply:
    place = broadcaster.place(generation, 1)
    request = ApplyWeightsRequest(version=version, group=place, timeout_seconds=30)
    return replica.loop.run(replica.post("/v1/weights", codec.encode(request), kind=ApplyWeightsReply))[1]


def test_versions_over_a_group_are_served_and_the_digest_is_that_of_the_sender(
    replica: Replica, trainer: Trainer, broadcaster: Broadcaster
) -> None:
    sync(replica, trainer, 200, 60)
    for version, seed, generation in ((201, 61, 1), (202, 62, 1), (203, 63, 2)):
        sending = broadcaster.send(generation, weights(seed))
        reply = take(replica, broadcaster, version, generation)
        assert isinstance(reply, ApplyWeightsReply), reply
        assert (reply.version, reply.digest) == (version, sending.result(20))
        assert (replica.engine.weight_version, replica.engine.weight_digest) == (version, reply.digest)
        assert reply.pull_seconds < 0.1 <= reply.bytes
        assert_serves(replica, seed, version)
    sync(replica, trainer, 204, 64)
    assert_serves(replica, 64, 204)


def test_a_group_that_nobody_comes_to_leaves_the_old_weights_serving(
    replica: Replica, trainer: Trainer, broadcaster: Broadcaster
) -> None:
    sync(replica, trainer, 210, 65)
    reply = take(replica, broadcaster, 211, 77)
    assert isinstance(reply, ErrorReply)
    assert reply.reason == "WeightsNotApplied"
    assert "weight group 77 of 2 members failed" in reply.message
    assert "The old weights serve" in reply.message
    assert_serves(replica, 65, 210)


def test_a_trainer_that_is_lost_in_the_middle_stops_the_engine_until_the_store_has_a_version(
    replica: Replica, trainer: Trainer, broadcaster: Broadcaster
) -> None:
    sync(replica, trainer, 220, 66)
    sending = broadcaster.send(3, weights(67), count=8)
    reply = take(replica, broadcaster, 221, 3)
    with pytest.raises(KeyboardInterrupt):
        sending.result(20)
    assert isinstance(reply, ErrorReply)
    assert reply.reason == "WeightsNotApplied"
    assert "until a sync succeeds" in reply.message
    assert replica.engine.weight_version is None
    assert replica.engine.broken
    sync(replica, trainer, 222, 68)
    assert_serves(replica, 68, 222)
    sending = broadcaster.send(4, weights(69))
    reply = take(replica, broadcaster, 223, 4)
    assert isinstance(reply, ApplyWeightsReply), reply
    assert reply.digest == sending.result(20)
    assert_serves(replica, 69, 223)


def test_an_engine_that_knows_no_tensors_is_sent_to_the_store(
    replica: Replica, broadcaster: Broadcaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica.engine, "_tensors", [])
    reply = take(replica, broadcaster, 231, 5)
    assert isinstance(reply, ErrorReply)
    assert reply.reason == "WeightGroup"
    assert "from the store first" in reply.message


@pytest.mark.parametrize("change", ["neither", "both"])
def test_a_version_comes_by_one_way(replica: Replica, trainer: Trainer, broadcaster: Broadcaster, change: str) -> None:
    source = trainer.publish(240, weights(70))
    request = ApplyWeightsRequest(
        version=240,
        store=source if change == "both" else None,
        group=broadcaster.place(6, 1) if change == "both" else None,
        timeout_seconds=5,
    )
    status, reply = replica.loop.run(replica.post("/v1/weights", codec.encode(request), kind=ApplyWeightsReply))
    assert (status, reply.reason) == (400, "InvalidRequest")
    assert "either from a store that has it, or over a group" in reply.message
