"""The frames between the pool and a worker: a 4-byte little-endian length, then the body.

Invariant: the pool sends pickles (the row's columns keep their types) and takes msgpack of known shape: a worker runs
code that nobody vouches for, so nothing it sends can execute in the pool's process. Replies come one by one, in the
order of the calls.
"""

import struct
from typing import Any, Literal

import msgspec

# unavailable: the function asked to be tried again for as long as it may.
FailureKind = Literal["timeout", "crash", "exception", "invalid", "unavailable"]

MAX_REPLY_BYTES = 4 * 1024 * 1024
_LENGTH = struct.Struct("<I")


class Setup(msgspec.Struct):
    """First frame to a worker."""

    function_name: str
    options: dict[str, Any]
    memory_limit_bytes: int | None = None
    # Of an async function: calls under way at a time, and the limit of each.
    concurrency: int = 1
    timeout_seconds: float = 60.0


class Ready(msgspec.Struct, tag=True):
    """The function is loaded, and takes so many calls at a time."""

    calls: int = 1


class LoadFailed(msgspec.Struct, tag=True):
    """The function could not be loaded; the worker ends."""

    message: str


class Scored(msgspec.Struct, tag=True):
    """The call's result, and the seconds inside the reward function."""

    score: float
    accuracy: float | None
    extra: dict[str, float]
    seconds: float
    answer: str | None = None


class NotNow(msgspec.Struct, tag=True):
    """The call raised TryAgain."""

    message: str
    seconds: float


class Failed(msgspec.Struct, tag=True):
    """The call raised something else, returned no finite score, or took too long (of an async function: the worker lives on)."""

    kind: Literal["exception", "invalid", "timeout"]
    message: str
    seconds: float


Reply = Ready | LoadFailed | Scored | NotNow | Failed
encode_reply = msgspec.msgpack.Encoder().encode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode


class DamagedReplyError(ValueError):
    """What a worker sent is not a reply."""


def frame(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Takes bytes as they come, gives whole bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_REPLY_BYTES:
                raise DamagedReplyError(f"a reply of {length} bytes (the limit is {MAX_REPLY_BYTES})")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies


def decode_reply(body: bytes) -> Reply:
    """Raises DamagedReplyError."""
    try:
        reply: Reply = _decode_reply(body)
    except msgspec.MsgspecError as error:
        raise DamagedReplyError(str(error)) from error
    return reply


def body_length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
    return int(length)


HEADER_BYTES = _LENGTH.size
