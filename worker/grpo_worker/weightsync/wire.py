"""The bytes on a weight-sync connection.

Invariant: every request carries the token and is answered by one header frame; only a header without an error is
followed by raw bytes, exactly `length` of them. Each socket operation has a limit.

Client to server: frame(Request). Server to client: frame(Reply), then for a range `length` raw bytes. A frame is 4
bytes little-endian length and msgpack.
"""

import socket
import struct
from typing import Literal, TypeVar

import msgspec

MAX_FRAME_BYTES = 64 << 20  # a manifest of 100 000 tensors is about 10 MB
CHUNK_BYTES = 1 << 20  # one socket call; also the unit that is hashed while it is still in the cache
SOCKET_BUFFER_BYTES = 4 << 20
_LENGTH = struct.Struct("<I")

T = TypeVar("T")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    version: int
    digest: str
    kind: Literal["manifest", "range"]
    start: int = 0
    end: int = 0


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    error: Literal["", "unauthorized", "not_held", "bad_request", "busy"] = ""
    message: str = ""
    length: int = 0  # raw bytes that follow


def tune(connection: socket.socket, timeout_seconds: float) -> None:
    connection.settimeout(timeout_seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def send_frame(connection: socket.socket, message: object) -> None:
    body = msgspec.msgpack.encode(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive_frame(connection: socket.socket, kind: type[T]) -> T:
    """Raises ConnectionError when the peer closes, OSError on a time-out, msgspec.DecodeError when it is not our
    protocol."""
    header = bytearray(_LENGTH.size)
    receive_exactly(connection, memoryview(header))
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise msgspec.DecodeError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}: not our protocol")
    body = bytearray(length)
    receive_exactly(connection, memoryview(body))
    return msgspec.msgpack.decode(body, type=kind)


def receive_exactly(connection: socket.socket, into: memoryview) -> None:
    received = 0
    while received < len(into):
        count = connection.recv_into(into[received:])
        if count == 0:
            raise ConnectionError(f"the peer closed the connection after {received} of {len(into)} bytes")
        received += count
