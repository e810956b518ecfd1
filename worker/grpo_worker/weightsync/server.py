"""The trainer's side of a pull: a TCP server thread that hands out ranges of a snapshot.

Invariant: no byte of weights leaves before the token was compared; a connection holds the version it reads, so a newer
publish never mixes two versions in one reply; every socket operation has a limit and the number of connections is
bounded, so a stuck reader costs one slot for a limited time.
"""

import hmac
import logging
import socket
import threading
from contextlib import ExitStack

import msgspec

from grpo_worker.errors import ConfigError
from grpo_worker.protocol.messages import StoreSource
from grpo_worker.weightsync import wire
from grpo_worker.weightsync.manifest import SnapshotManifest, VersionNotHeldError
from grpo_worker.weightsync.snapshot import Snapshot, SnapshotStore

log = logging.getLogger(__name__)


class WeightServer:
    """Serves the versions of a store until `close`."""

    def __init__(
        self,
        store: SnapshotStore,
        host: str,
        port: int,
        token: str,
        *,
        timeout_seconds: float = 60.0,
        max_connections: int = 256,
    ) -> None:
        """Bind and start to serve.

        Args:
            store: where versions are published.
            host: address to bind.
            port: 0 takes any free port (`.port` tells which).
            token: the job's token; '' guards nothing.
            timeout_seconds: limit of one socket operation, and of an idle connection.
            max_connections: more are answered 'busy'.

        Raises:
            ConfigError: the port cannot be bound.
        """
        self._store, self._token, self._timeout_seconds = store, token, timeout_seconds
        try:
            self._listener = socket.create_server((host, port), backlog=128)
        except OSError as error:
            raise ConfigError(
                f"network.weightSyncPort: cannot bind {host}:{port} ({error.strerror}). Free the port, or set another (0: any free one)."
            ) from error
        self.host, self.port = host, self._listener.getsockname()[1]
        self._slots = threading.BoundedSemaphore(max_connections)
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closing = False
        self.sent_bytes = 0
        self._acceptor = threading.Thread(target=self._accept, name="weight-server", daemon=True)
        self._acceptor.start()

    def source(self, manifest: SnapshotManifest, host: str | None = None) -> StoreSource:
        """Where replicas find a version. `host` is the address that they can reach (default: the bound one)."""
        return StoreSource(
            host=host or self.host,
            port=self.port,
            version=manifest.version,
            digest=manifest.digest,
            total_bytes=manifest.total_bytes,
        )

    def close(self) -> None:
        with self._lock:
            self._closing = True
            connections = list(self._connections)
        for sock in [self._listener, *connections]:
            _shut(sock)
        self._acceptor.join(self._timeout_seconds)

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                if self._closing:
                    return
                log.exception("weight server: accept failed")
                continue
            peer = f"{address[0]}:{address[1]}"
            wire.tune(connection, self._timeout_seconds)
            if not self._slots.acquire(blocking=False):
                _refuse(connection, "busy", "too many weight-sync connections; try again")
                continue
            with self._lock:
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection, peer), name=f"weight-server-{peer}", daemon=True
            ).start()

    def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            with ExitStack() as held:
                snapshot: Snapshot | None = None
                while True:
                    request = wire.receive_frame(connection, wire.Request)
                    if self._token and not hmac.compare_digest(request.token.encode(), self._token.encode()):
                        log.warning("weight server: %s sent a wrong token", peer)
                        _refuse(connection, "unauthorized", "the job's token is missing or wrong")
                        return
                    if snapshot is None or snapshot.manifest.version != request.version:
                        held.close()
                        try:
                            snapshot = held.enter_context(self._store.read(request.version, peer))
                        except VersionNotHeldError as error:
                            _refuse(connection, "not_held", str(error))
                            return
                    self._answer(connection, request, snapshot)
        except (OSError, msgspec.DecodeError) as error:
            # The peer has what it wanted, or lost interest; its own side reports what it misses.
            log.debug("weight server: connection of %s ended: %s", peer, error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            self._slots.release()

    def _answer(self, connection: socket.socket, request: wire.Request, snapshot: Snapshot) -> None:
        manifest = snapshot.manifest
        if request.digest != manifest.digest:
            held = f"version {manifest.version} is held with digest {manifest.digest}, not {request.digest}"
            _refuse(connection, "not_held", held)
            return
        if request.kind == "manifest":
            body = memoryview(msgspec.msgpack.encode(manifest))
        elif 0 <= request.start <= request.end <= manifest.total_bytes:
            body = snapshot.data[request.start : request.end]
        else:
            outside = f"range {request.start}..{request.end} is outside 0..{manifest.total_bytes}"
            _refuse(connection, "bad_request", outside)
            return
        wire.send_frame(connection, wire.Reply(length=len(body)))
        for start in range(0, len(body), wire.CHUNK_BYTES):
            connection.sendall(body[start : start + wire.CHUNK_BYTES])
        with self._lock:
            self.sent_bytes += len(body)


def _refuse(connection: socket.socket, error: str, message: str) -> None:
    """Answer with an error and end the connection."""
    try:
        wire.send_frame(connection, wire.Reply(error=error, message=message))  # type: ignore[arg-type]
        connection.shutdown(socket.SHUT_WR)
        # Closing with unread input would reset the connection, and the peer would lose this answer.
        connection.settimeout(1.0)
        connection.recv(wire.CHUNK_BYTES)
    except OSError as failure:
        log.debug("weight server: refusal was not received: %s", failure)
    finally:
        connection.close()


def _shut(sock: socket.socket) -> None:
    """Wake a thread that is blocked in this socket, then close it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("weight server: socket was closed already")
    sock.close()
