"""The replica's side of a pull: parallel connections that fill one staging buffer.

Invariant: `pull` returns only when every byte of every tensor has arrived and matches its checksum; otherwise it
raises, and what the staging buffer holds then is of no use to anybody. Each connection takes whole tensors and hashes
them chunk by chunk as they arrive, while they are in the processor's cache.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import msgspec
import xxhash

from grpo_worker.errors import ConfigError, PeerLostError, RetryableError
from grpo_worker.protocol.messages import StoreSource
from grpo_worker.weightsync import wire
from grpo_worker.weightsync.manifest import (
    SnapshotManifest,
    TensorEntry,
    VersionNotHeldError,
    WeightsDamagedError,
    check_places,
)

BATCH_BYTES = 32 << 20  # small tensors that one request asks for together


def fetch_manifest(source: StoreSource, *, token: str, timeout_seconds: float, deadline: float) -> SnapshotManifest:
    """Ask for a version's manifest and check that it is the one that the source announces.

    Args:
        timeout_seconds: limit of one socket operation.
        deadline: `time.monotonic()` by which it must be done.

    Raises:
        PeerLostError: the server is gone or too slow. VersionNotHeldError: it serves other versions. ConfigError: wrong
            token.
        WeightsDamagedError: the manifest is not the announced one.
    """
    pull = _Pull(source, token, timeout_seconds, deadline)
    try:
        with pull.connect() as connection:
            length = pull.ask(connection, "manifest")
            body = bytearray(length)
            pull.receive(connection, memoryview(body), None)
        manifest = msgspec.msgpack.decode(body, type=SnapshotManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise pull.lost(error) from error
    if (
        manifest.digest != source.digest
        or manifest.total_bytes != source.total_bytes
        or manifest.version != source.version
    ):
        raise WeightsDamagedError(
            f"weights of version {source.version} from {pull.peer}: the manifest's digest is {manifest.digest}, announced was {source.digest}"
        )
    check_places(manifest)
    return manifest


def pull(
    source: StoreSource,
    *,
    token: str,
    into: Callable[[int], memoryview],
    streams: int = 4,
    timeout_seconds: float = 60.0,
    deadline: float,
    check: Callable[[SnapshotManifest], None] | None = None,
) -> SnapshotManifest:
    """Pull one version into a staging buffer and verify it.

    Args:
        into: gives the buffer for a number of bytes; called once, after `check`.
        streams: parallel connections.
        timeout_seconds: limit of one socket operation.
        deadline: `time.monotonic()` by which all must be done.
        check: refuses a manifest (by raising) before any weight is pulled.

    Raises:
        PeerLostError: naming host, port and the bytes received. WeightsDamagedError: naming the tensor whose checksum
            differs.
        VersionNotHeldError, ConfigError: as `fetch_manifest`.
    """
    manifest = fetch_manifest(source, token=token, timeout_seconds=timeout_seconds, deadline=deadline)
    if check is not None:
        check(manifest)
    state = _Pull(source, token, timeout_seconds, deadline)
    buffer = into(manifest.total_bytes)
    work = deque(batches(manifest.tensors))
    with ThreadPoolExecutor(max(1, min(streams, len(work))), thread_name_prefix="weight-pull") as pool:
        futures = [pool.submit(state.run, work, buffer) for _ in range(max(1, min(streams, len(work))))]
        done, _ = wait(futures)
    # The first failure explains the others: they end because it cut their connections.
    for error in sorted(
        (e for future in done if (e := future.exception())), key=lambda e: isinstance(e, _StoppedError)
    ):
        raise error
    return manifest


def batches(tensors: Sequence[TensorEntry], batch_bytes: int = BATCH_BYTES) -> list[list[TensorEntry]]:
    """Neighbouring tensors in groups of about `batch_bytes`, the largest groups first so that no stream ends long after
    the others."""
    groups: list[list[TensorEntry]] = []
    size = batch_bytes
    for entry in tensors:
        if size + entry.size_bytes > batch_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.size_bytes
    return sorted(groups, key=lambda group: -sum(entry.size_bytes for entry in group))


class _StoppedError(Exception):
    """Another stream of the same pull failed first."""


class _Pull:
    """What the streams of one pull share."""

    def __init__(self, source: StoreSource, token: str, timeout_seconds: float, deadline: float) -> None:
        self._source, self._token = source, token
        self._timeout_seconds, self._deadline = timeout_seconds, deadline
        self.peer = f"{source.host}:{source.port}"
        self._lock = threading.Lock()
        self._received_bytes = 0
        self._failed = False

    def run(self, work: deque[list[TensorEntry]], buffer: memoryview) -> None:
        """One stream: takes groups of tensors until none is left."""
        try:
            with self.connect() as connection:
                while not self._failed:
                    try:
                        group = work.popleft()
                    except IndexError:
                        return
                    self._pull_group(connection, group, buffer)
            raise _StoppedError
        except BaseException as error:
            self._failed = True
            if isinstance(error, OSError | msgspec.DecodeError):
                raise self.lost(error) from error
            raise

    def connect(self) -> socket.socket:
        try:
            connection = socket.create_connection((self._source.host, self._source.port), timeout=self._limit())
        except OSError as error:
            raise self.lost(error) from error
        wire.tune(connection, self._limit())
        return connection

    def ask(self, connection: socket.socket, kind: str, start: int = 0, end: int = 0) -> int:
        """Send a request; returns how many raw bytes follow."""
        request = wire.Request(
            token=self._token, version=self._source.version, digest=self._source.digest, kind=kind, start=start, end=end  # type: ignore[arg-type]
        )  # fmt: skip
        connection.settimeout(self._limit())
        wire.send_frame(connection, request)
        reply = wire.receive_frame(connection, wire.Reply)
        if reply.error == "unauthorized":
            raise ConfigError(
                f"weight server {self.peer}: {reply.message}. Both sides must run with the same GRPO_JOB_TOKEN."
            )
        if reply.error == "not_held":
            raise VersionNotHeldError(f"weight server {self.peer}: {reply.message}")
        if reply.error == "busy":
            raise RetryableError(f"weight server {self.peer}: {reply.message}")
        if reply.error:
            raise WeightsDamagedError(f"weight server {self.peer}: {reply.message}")
        return reply.length

    def receive(self, connection: socket.socket, into: memoryview, hasher: xxhash.xxh3_64 | None) -> None:
        for start in range(0, len(into), wire.CHUNK_BYTES):
            chunk = into[start : start + wire.CHUNK_BYTES]
            connection.settimeout(self._limit())
            wire.receive_exactly(connection, chunk)
            with self._lock:
                self._received_bytes += len(chunk)
            if hasher is not None:
                hasher.update(chunk)
            if self._failed:
                raise _StoppedError

    def lost(self, error: Exception) -> PeerLostError:
        return PeerLostError(
            f"weight server {self.peer}: lost after {self._received_bytes} of {self._source.total_bytes} bytes of version "
            f"{self._source.version} ({type(error).__name__}: {error}). The old weights stay."
        )

    def _pull_group(self, connection: socket.socket, group: list[TensorEntry], buffer: memoryview) -> None:
        start, end = group[0].offset, group[-1].offset + group[-1].size_bytes
        if (length := self.ask(connection, "range", start, end)) != end - start:
            raise WeightsDamagedError(
                f"weight server {self.peer}: answered {length} bytes for the range {start}..{end}"
            )
        position = start
        for entry in group:
            self.receive(connection, buffer[position : entry.offset], None)  # alignment padding
            position = entry.offset + entry.size_bytes
            hasher = xxhash.xxh3_64()
            self.receive(connection, buffer[entry.offset : position], hasher)
            if hasher.intdigest() != entry.checksum:
                raise WeightsDamagedError(
                    f"weight server {self.peer}: checksum of tensor '{entry.name}' in version {self._source.version} is "
                    f"{hasher.intdigest():016x}, published was {entry.checksum:016x}. The old weights stay."
                )

    def _limit(self) -> float:
        """Seconds that the next socket operation may take."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the weight sync's time limit has passed")
        return min(self._timeout_seconds, left)
