"""Server and client over real sockets: what arrives is what was published, or an error that names who and what."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import msgspec
import pytest
import torch
from cutting_proxy import Proxy

from grpo_worker.errors import ConfigError, PeerLostError, RetryableError
from grpo_worker.protocol.messages import StoreSource
from grpo_worker.weightsync import wire
from grpo_worker.weightsync.client import batches, fetch_manifest, pull
from grpo_worker.weightsync.manifest import (
    SnapshotManifest,
    TensorEntry,
    TensorSpec,
    VersionNotHeldError,
    WeightsDamagedError,
)
from grpo_worker.weightsync.server import WeightServer
from grpo_worker.weightsync.snapshot import SnapshotStore

TOKEN = "a-token"
SPECS = [TensorSpec(f"layer.{i}", (1000 + i, 37), "float32") for i in range(12)] + [
    TensorSpec("norm", (3,), "bfloat16")
]


def publish(store: SnapshotStore, version: int) -> SnapshotManifest:
    with store.begin(version, SPECS) as writer:
        for spec in SPECS:
            writer.write(spec.name, torch.rand(spec.shape, generator=torch.Generator().manual_seed(version)))
        return writer.commit()


@pytest.fixture
def store() -> SnapshotStore:
    return SnapshotStore(timeout_seconds=5)


@pytest.fixture
def server(store: SnapshotStore) -> Iterator[WeightServer]:
    with closing(WeightServer(store, "127.0.0.1", 0, TOKEN, timeout_seconds=10)) as server:
        yield server


class Staging:
    """A buffer as large as the pull asks for."""

    def __init__(self) -> None:
        self.data = bytearray()

    def __call__(self, total_bytes: int) -> memoryview:
        self.data = bytearray(total_bytes)
        return memoryview(self.data)


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def content(store: SnapshotStore, version: int) -> bytes:
    with store.read(version, "test") as snapshot:
        return bytes(snapshot.data)


def tensors(data: bytes, manifest: SnapshotManifest) -> list[bytes]:
    return [data[entry.offset : entry.offset + entry.size_bytes] for entry in manifest.tensors]


@pytest.mark.parametrize("streams", [1, 4, 32])
def test_a_pull_brings_every_tensor_whatever_the_number_of_streams(
    store: SnapshotStore, server: WeightServer, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_worker.weightsync.client.batches", lambda tensors: batches(tensors, 200_000))
    published, staging = publish(store, 1), Staging()
    manifest = pull(server.source(published), token=TOKEN, into=staging, streams=streams, deadline=soon())
    assert manifest == published
    assert tensors(bytes(staging.data), manifest) == tensors(content(store, 1), manifest)


def test_a_pull_that_runs_over_a_newer_publish_gets_the_version_it_asked_for(
    store: SnapshotStore, server: WeightServer
) -> None:
    first = publish(store, 1)
    wanted, staging = content(store, 1), Staging()

    def publish_next(manifest: SnapshotManifest) -> None:
        publish(store, 2)

    manifest = pull(server.source(first), token=TOKEN, into=staging, deadline=soon(), check=publish_next)
    assert manifest.version == 1
    assert tensors(bytes(staging.data), manifest) == tensors(wanted, manifest)


def test_a_wrong_token_gets_no_byte(store: SnapshotStore, server: WeightServer) -> None:
    source = server.source(publish(store, 1))
    with pytest.raises(ConfigError, match=r"token is missing or wrong.*GRPO_JOB_TOKEN"):
        pull(source, token="another", into=Staging(), deadline=soon())
    assert server.sent_bytes == 0


def test_an_old_version_is_refused_with_the_versions_that_are_held(store: SnapshotStore, server: WeightServer) -> None:
    old = server.source(publish(store, 1))
    for version in (2, 3):
        publish(store, version)
    with pytest.raises(VersionNotHeldError, match=r"version 1 is not held \(held: 2, 3\)"):
        pull(old, token=TOKEN, into=Staging(), deadline=soon())


def test_a_version_with_another_digest_is_refused(store: SnapshotStore, server: WeightServer) -> None:
    source = msgspec.structs.replace(server.source(publish(store, 1)), digest="0" * 32)
    with pytest.raises(VersionNotHeldError, match="digest"):
        fetch_manifest(source, token=TOKEN, timeout_seconds=5, deadline=soon())


def test_bytes_that_changed_after_the_publish_name_their_tensor(store: SnapshotStore, server: WeightServer) -> None:
    manifest = publish(store, 1)
    damaged = manifest.tensors[5]
    memory = store._buffers[0].memory  # as a broken memory module or network card would
    memory[damaged.offset + 99] ^= 1
    with pytest.raises(WeightsDamagedError, match=r"checksum of tensor 'layer.5' in version 1"):
        pull(server.source(manifest), token=TOKEN, into=Staging(), deadline=soon())


def test_a_refused_manifest_stops_the_pull_before_any_weight_moves(store: SnapshotStore, server: WeightServer) -> None:
    def refuse(manifest: SnapshotManifest) -> None:
        raise ValueError("does not fit")

    source = server.source(publish(store, 1))
    with pytest.raises(ValueError, match="does not fit"):
        pull(source, token=TOKEN, into=Staging(), deadline=soon(), check=refuse)
    assert server.sent_bytes < 4096  # the manifest


def test_a_cut_in_the_middle_names_the_peer_and_how_far_it_came(store: SnapshotStore, server: WeightServer) -> None:
    manifest = publish(store, 1)
    with closing(Proxy(server.port, manifest.total_bytes // 2)) as proxy:
        source = msgspec.structs.replace(server.source(manifest), port=proxy.port)
        with pytest.raises(
            PeerLostError, match=rf"127.0.0.1:{proxy.port}: lost after \d+ of {manifest.total_bytes} bytes of version 1"
        ):
            pull(source, token=TOKEN, into=Staging(), deadline=soon())
    staging = Staging()
    pull(server.source(manifest), token=TOKEN, into=staging, deadline=soon())
    assert tensors(bytes(staging.data), manifest) == tensors(content(store, 1), manifest)


def test_a_server_that_is_not_there_is_a_lost_peer() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    source = StoreSource(host="127.0.0.1", port=port, version=1, digest="", total_bytes=1)
    with pytest.raises(PeerLostError, match=f"127.0.0.1:{port}"):
        pull(source, token="", into=Staging(), deadline=soon())


@pytest.mark.parametrize(("timeout_seconds", "deadline_seconds"), [(0.2, 20), (20, 0.2)])
def test_a_silent_server_costs_the_limit_and_no_more(timeout_seconds: float, deadline_seconds: float) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        source = StoreSource(host="127.0.0.1", port=listener.getsockname()[1], version=1, digest="", total_bytes=1)
        started = time.monotonic()
        with pytest.raises(PeerLostError, match=r"TimeoutError|timed out"):
            pull(source, token="", into=Staging(), timeout_seconds=timeout_seconds, deadline=soon(deadline_seconds))
        assert time.monotonic() - started < 5


def test_more_connections_than_allowed_are_answered_busy(store: SnapshotStore) -> None:
    with closing(WeightServer(store, "127.0.0.1", 0, TOKEN, max_connections=1)) as server:
        source = server.source(publish(store, 1))
        stranger = socket.create_connection(("127.0.0.1", server.port))
        with stranger, pytest.raises(RetryableError, match="too many"):
            fetch_manifest(source, token=TOKEN, timeout_seconds=5, deadline=soon())


@pytest.mark.parametrize(
    "talk",
    [
        lambda connection: connection.sendall(b"GET / HTTP/1.1\r\n\r\n"),
        lambda connection: connection.sendall(b"\x05\x00\x00\x00\xc1\xc1\xc1\xc1\xc1"),
        lambda connection: None,
    ],
)
def test_strangers_do_not_disturb_the_server(
    store: SnapshotStore, server: WeightServer, talk: Callable[[socket.socket], None]
) -> None:
    source = server.source(publish(store, 1))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        talk(connection)
        pull(source, token=TOKEN, into=Staging(), deadline=soon())


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (6, 5), (0, 10**9)])
def test_a_range_outside_the_snapshot_is_refused(
    store: SnapshotStore, server: WeightServer, start: int, end: int
) -> None:
    source = server.source(publish(store, 1))
    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        request = wire.Request(token=TOKEN, version=1, digest=source.digest, kind="range", start=start, end=end)
        wire.send_frame(connection, request)
        assert wire.receive_frame(connection, wire.Reply).error == "bad_request"


def test_a_port_in_use_names_the_field(store: SnapshotStore, server: WeightServer) -> None:
    with pytest.raises(ConfigError, match=rf"network.weightSyncPort: cannot bind 127.0.0.1:{server.port}"):
        WeightServer(store, "127.0.0.1", server.port, TOKEN)


def test_batches_keep_neighbours_together_and_lose_nothing() -> None:
    entries = [TensorEntry(str(i), (size,), "uint8", 0, size, 0) for i, size in enumerate([1, 2, 100, 3, 50, 60, 1])]
    groups = batches(entries, 100)
    assert sorted(entry.name for group in groups for entry in group) == [str(i) for i in range(7)]
    assert [[entry.name for entry in group] for group in groups] == [["2"], ["5", "6"], ["3", "4"], ["0", "1"]]
