"""What a worker answers of a call, and how frames come in and go out of it.

Invariant: a reply fits into the pool's limit, whatever the function has returned or raised.
"""

import os
from typing import BinaryIO

from grpo_worker.functions import traceback_tail
from grpo_worker.rewards.base import InvalidRewardError, RewardResult, TryAgain
from grpo_worker.rewards.wire import (
    HEADER_BYTES,
    MAX_REPLY_BYTES,
    Failed,
    NotNow,
    Reply,
    Scored,
    body_length,
    encode_reply,
    frame,
)

_MESSAGE_CHARACTERS = 4000


def failed(error: BaseException, seconds: float) -> NotNow | Failed:
    if isinstance(error, TryAgain):
        return NotNow(str(error)[:_MESSAGE_CHARACTERS] or "no reason given", seconds)
    if isinstance(error, InvalidRewardError):
        return Failed("invalid", str(error)[:_MESSAGE_CHARACTERS], seconds)
    return Failed("exception", traceback_tail(error)[-_MESSAGE_CHARACTERS:], seconds)


def scored(result: RewardResult, seconds: float) -> Scored:
    answer = None if result.answer is None else result.answer[:_MESSAGE_CHARACTERS]
    return Scored(result.score, result.accuracy, result.extra, seconds, answer)


def read_frame(requests: BinaryIO) -> bytes | None:
    header = requests.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    length = body_length(header)
    body = requests.read(length)
    return body if len(body) == length else None


def send(replies: int, reply: Reply) -> None:
    body = encode_reply(reply)
    if len(body) > MAX_REPLY_BYTES:
        body = encode_reply(
            Failed("invalid", f"the result takes {len(body)} bytes (the limit is {MAX_REPLY_BYTES})", 0.0)
        )
    view = memoryview(frame(body))
    while view:
        view = view[os.write(replies, view) :]
