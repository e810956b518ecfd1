"""A worker's calls of an async function, side by side.

Invariant: calls start in their order, `Setup.concurrency` of them at a time, and are answered in it; one that takes too long fails alone.
"""

import asyncio
import pickle
import time
from typing import BinaryIO

from grpo_worker.rewards.base import RewardFunction
from grpo_worker.rewards.replies import failed, read_frame, scored, send
from grpo_worker.rewards.wire import Failed, Reply, Setup


def serve(function: RewardFunction, setup: Setup, requests: BinaryIO, replies: int) -> None:
    """Until the requests end."""
    asyncio.run(_serve(function, setup, requests, replies))


async def _serve(function: RewardFunction, setup: Setup, requests: BinaryIO, replies: int) -> None:
    """Calls start in their order, `concurrency` of them at a time, and are answered in it."""
    places = asyncio.Semaphore(setup.concurrency)
    under_way: asyncio.Queue[asyncio.Task[Reply] | None] = asyncio.Queue()

    async def answer() -> None:
        while (task := await under_way.get()) is not None:
            send(replies, await task)

    answering = asyncio.create_task(answer())
    while (body := await asyncio.to_thread(read_frame, requests)) is not None:
        await places.acquire()
        task = asyncio.create_task(_call_async(function, body, setup.timeout_seconds))
        task.add_done_callback(lambda _: places.release())
        under_way.put_nowait(task)
    under_way.put_nowait(None)
    await answering


async def _call_async(function: RewardFunction, body: bytes, limit_seconds: float) -> Reply:
    start = time.perf_counter()
    try:
        async with asyncio.timeout(limit_seconds) as limit:
            result = await function(pickle.loads(body))
    except BaseException as error:
        seconds = time.perf_counter() - start
        if isinstance(error, TimeoutError) and limit.expired():
            return Failed("timeout", f"no result within {limit_seconds:g} s (reward.timeoutSeconds)", seconds)
        return failed(error, seconds)
    return scored(result, time.perf_counter() - start)
