"""Whatever goes wrong with a sync, the engine serves the weights that it says it serves."""

import time
from collections.abc import Callable
from contextlib import closing

import msgspec
import pytest
import torch
from cutting_proxy import Proxy
from replica_helpers import Replica, Trainer, weights
from test_rollout_engine import assert_serves, sync

from grpo_worker.protocol.messages import ErrorReply

Tensors = dict[str, torch.Tensor]
FIRST = "model.layers.0.self_attn.v_proj.weight"


def without(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != FIRST}


def without_norm(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}


def with_extra(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.9.extra": torch.zeros(2)}


def wrong_shape(tensors: Tensors) -> Tensors:
    return {**tensors, FIRST: tensors[FIRST][:, ::2]}


def wrong_dtype(tensors: Tensors) -> Tensors:
    return {**tensors, FIRST: tensors[FIRST].to(torch.float16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, f"missing: {FIRST}"),
        (with_extra, "unexpected: model.layers.9.extra"),
        (wrong_shape, f"wrong shape: {FIRST}"),
        (wrong_dtype, f"wrong dtype: {FIRST} float16"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_serve(
    replica: Replica, trainer: Trainer, change: Callable[[Tensors], Tensors], message: str
) -> None:
    sync(replica, trainer, 30, 31)
    status, reply = replica.apply(trainer.publish(31, change(weights(32))))
    assert isinstance(reply, ErrorReply)
    assert (status, reply.reason) == (422, "WeightsMismatch")
    assert message in reply.message
    assert_serves(replica, 31, 30)


def test_a_cut_in_the_middle_leaves_the_old_weights_and_a_retry_works(replica: Replica, trainer: Trainer) -> None:
    sync(replica, trainer, 32, 33)
    source = trainer.publish(33, weights(34))
    with closing(Proxy(trainer.server.port, source.total_bytes // 2)) as proxy:
        status, reply = replica.apply(msgspec.structs.replace(source, port=proxy.port))
    assert isinstance(reply, ErrorReply)
    assert (status, reply.reason) == (502, "PeerLost")
    assert f"127.0.0.1:{proxy.port}: lost after" in reply.message
    assert_serves(replica, 33, 32)
    assert replica.apply(source)[0] == 200
    assert_serves(replica, 34, 33)


def test_a_wrong_checksum_is_refused_by_tensor(replica: Replica, trainer: Trainer) -> None:
    sync(replica, trainer, 34, 35)
    manifest = trainer.publish_manifest(35, weights(36))
    entry = next(entry for entry in manifest.tensors if entry.name == FIRST)
    buffer = next(buffer for buffer in trainer.store._buffers if buffer.manifest is manifest)
    buffer.memory[entry.offset + 5] ^= 1
    status, reply = replica.apply(trainer.server.source(manifest))
    assert isinstance(reply, ErrorReply)
    assert (status, reply.reason) == (502, "WeightsDamaged")
    assert f"checksum of tensor '{FIRST}'" in reply.message
    assert_serves(replica, 35, 34)


def test_a_version_that_is_gone_is_a_conflict(replica: Replica, trainer: Trainer) -> None:
    old = trainer.publish(36, weights(37))
    for version in (37, 38):
        trainer.publish(version, weights(37))
    status, reply = replica.apply(old)
    assert isinstance(reply, ErrorReply)
    assert (status, reply.reason) == (409, "VersionNotHeld")
    assert "held: 37, 38" in reply.message


def test_a_trainer_with_another_token_is_refused(
    replica: Replica, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(replica, trainer, 39, 38)
    source = trainer.publish(40, weights(39))
    monkeypatch.setattr(trainer.server, "_token", "another")
    status, reply = replica.apply(source)
    assert isinstance(reply, ErrorReply)
    assert status == 502
    assert "token is missing or wrong" in reply.message
    assert_serves(replica, 38, 39)


def test_a_sync_that_is_too_slow_ends_at_its_limit(replica: Replica, trainer: Trainer) -> None:
    source = trainer.publish(41, weights(40))
    with closing(Proxy(trainer.server.port, 10**9)) as proxy:
        proxy._lock.acquire()  # answers are held back
        started = time.monotonic()
        status, reply = replica.apply(msgspec.structs.replace(source, port=proxy.port), timeout_seconds=0.5)
        assert time.monotonic() - started < 10
        proxy._lock.release()
    assert isinstance(reply, ErrorReply)
    assert (status, reply.reason) == (502, "PeerLost")


def test_a_swap_that_fails_half_way_stops_generation_until_a_sync_succeeds(
    replica: Replica, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the manifest check would refuse is let through: an unknown name, at which vLLM itself fails while it loads, and a
    parameter without weights, which vLLM only logs."""
    sync(replica, trainer, 42, 41)
    monkeypatch.setattr("grpo_worker.rollout.engine.verify", lambda *_, **__: None)
    for version, change in ((43, with_extra), (44, without_norm)):
        status, reply = replica.apply(trainer.publish(version, change(weights(42))))
        assert isinstance(reply, ErrorReply)
        assert (status, reply.reason) == (502, "WeightsNotApplied")
        assert replica.engine.weight_version is None
        assert replica.engine.broken
    sync(replica, trainer, 45, 43)
    assert_serves(replica, 43, 45)
