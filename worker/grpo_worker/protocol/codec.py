"""Bytes of the messages: msgpack by msgspec, and length-prefixed frames for streamed replies.

Invariant: what does not decode into the expected type is refused with a message that names the field; a truncated stream is an
error, never an early end.
"""

import asyncio
import struct
from typing import Any, TypeVar

import msgspec

from grpo_worker.errors import PeerLostError

CONTENT_TYPE = "application/msgpack"
MAX_FRAME_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()

T = TypeVar("T")


def encode(message: Any) -> bytes:
    return _encoder.encode(message)


def decode(body: bytes, kind: type[T] | Any) -> T:
    """Raises msgspec.ValidationError, whose message names the field at fault."""
    return msgspec.msgpack.decode(body, type=kind)


def frame(message: Any) -> bytes:
    """One message of a stream: 4 bytes little-endian length, then msgpack."""
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader | Any, kind: type[T] | Any, timeout_seconds: float) -> T:
    """Read one frame from an aiohttp response's content (or any reader with `readexactly`).

    Raises PeerLostError when the stream ends inside or before a frame, TimeoutError after `timeout_seconds`.
    """
    async with asyncio.timeout(timeout_seconds):
        try:
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            if length > MAX_FRAME_BYTES:
                raise PeerLostError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}: not our stream")
            body = await reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise PeerLostError(f"the stream ended after {len(error.partial)} of {error.expected} bytes") from error
    return decode(body, kind)
