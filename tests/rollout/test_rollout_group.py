"""Weights over a group: the engine that served a version from the store takes the next ones from the trainer's broadcast."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from replica_helpers import Replica, Trainer, until, weights
from test_rollout_engine import PROMPTS, assert_serves, request_of, sync

from grpo_worker.protocol import codec
from grpo_worker.protocol.messages import (
    ApplyWeightsReply,
    ApplyWeightsRequest,
    ErrorReply,
    GroupPlace,
    GroupResult,
    SleepReply,
    SleepRequest,
)
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

    def place(self, generation: int, rank: int, pair: int | None = None) -> GroupPlace:
        return GroupPlace(
            host="127.0.0.1",
            port=self._meeting_point.port,
            generation=generation,
            rank=rank,
            world_size=2,
            patience_seconds=3.0,
            bucket_bytes=BUCKET_BYTES,
            pair=pair,
        )

    def send(self, generation: int, tensors: Tensors, count: int = 1000, pair: int | None = None) -> "Future[str]":
        """The digest; after `count` tensors the process is gone."""
        listed = [TensorSpec(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()]

        def some() -> Iterator[tuple[str, torch.Tensor]]:
            yield from list(tensors.items())[:count]
            if count < len(tensors):
                raise KeyboardInterrupt

        def work() -> str:
            if self.group is None or self.group.place.generation != generation:
                self.group = WeightGroup(self.place(generation, 0, pair), CPU)
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


def take(
    replica: Replica, broadcaster: Broadcaster, version: int, generation: int, pair: int | None = None
) -> ApplyWeightsReply | ErrorReply:
    place = broadcaster.place(generation, 1, pair)
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


# --- colocated: asleep while the trainer works, awake with its next weights -----------------------------------------------------


def put_to_sleep(replica: Replica, timeout_seconds: float = 10.0) -> tuple[int, SleepReply | ErrorReply]:
    body = codec.encode(SleepRequest(timeout_seconds=timeout_seconds))
    return replica.loop.run(replica.post("/v1/sleep", body, kind=SleepReply))


@pytest.mark.parametrize("way", ["pair", "store"])
def test_an_engine_that_sleeps_has_no_weights_until_the_next_ones_wake_it(
    replica: Replica, trainer: Trainer, broadcaster: Broadcaster, way: str
) -> None:
    version = 250 if way == "pair" else 260
    sync(replica, trainer, version, 71)
    for _ in range(2):  # one that sleeps already stays so
        assert put_to_sleep(replica) == (200, SleepReply(device_bytes=0))
    engine = replica.engine
    assert (engine.weight_version, engine.weight_digest) == (None, None)
    assert engine._llm.is_sleeping()
    refused = replica.loop.run(replica.post("/v1/generate", codec.encode(request_of(PROMPTS, min_weight_version=0))))
    assert (refused[0], refused[1].reason) == (409, "StaleWeights")
    if way == "pair":
        sending = broadcaster.send(10, weights(72), pair=0)
        reply = take(replica, broadcaster, version + 1, 10, pair=0)
        assert isinstance(reply, ApplyWeightsReply), reply
        assert (reply.version, reply.digest) == (version + 1, sending.result(20))
    else:
        sync(replica, trainer, version + 1, 72)
    assert not engine._llm.is_sleeping()
    assert_serves(replica, 72, version + 1)


def test_an_engine_that_nobody_wakes_does_not_serve_what_it_had(
    replica: Replica, trainer: Trainer, broadcaster: Broadcaster
) -> None:
    sync(replica, trainer, 270, 73)
    put_to_sleep(replica)
    reply = take(replica, broadcaster, 271, 78, pair=0)
    assert isinstance(reply, ErrorReply)
    assert reply.reason == "WeightsNotApplied"
    assert "until a sync succeeds" in reply.message, "it has no old weights to serve"
    assert replica.engine.broken
    sync(replica, trainer, 272, 74)
    assert_serves(replica, 74, 272)


def test_an_engine_sleeps_after_the_requests_that_run(replica: Replica, trainer: Trainer) -> None:
    sync(replica, trainer, 280, 75)
    results: dict[str, GroupResult] = {}
    running = asyncio.run_coroutine_threadsafe(
        replica.generate_async(request_of(PROMPTS, max_tokens=200), results), replica.loop.loop
    )
    replica.loop.run(until(lambda: replica.engine.stats()["running"] > 0, "the engine runs the request"))
    assert put_to_sleep(replica, 30.0) == (200, SleepReply(device_bytes=0))
    running.result(1)
    assert {name: len(result.samples[0].token_ids.numpy()) for name, result in results.items()} == dict.fromkeys(
        PROMPTS, 200
    )
    sync(replica, trainer, 281, 76)
