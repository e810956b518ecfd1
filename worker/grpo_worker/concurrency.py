"""Coroutines that live and die together, that wait for a change, and that share a place.

Invariants: when one of `first_to_end` ends, the others are cancelled and have ended before the caller goes on, and an exception is never
lost. Nothing here awaits on its way out: whoever is cancelled, at whatever point, leaves nobody asleep.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

T = TypeVar("T")


async def first_to_end(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Run all until the first ends, and raise its exception if it has one."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_daemon_thread(function: Callable[..., T], *arguments: Any) -> T:
    """`asyncio.to_thread`, but a process that is told to stop does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(cast(T, result))

    def work() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = (function(*arguments), None)
        except BaseException as error:
            outcome = (None, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


class Changes:
    """A notice board: `notify` wakes all who wait at that moment."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def notify(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        await self._next.wait()


class Gate:
    """Many shared holders, or one exclusive, and while that one is inside nobody else is. A waiting exclusive holder keeps newcomers
    out, so it is not starved; with `pass_waiting` one passes those who wait, but not one who is inside. Waiting is bounded by the
    caller's `asyncio.timeout`."""

    def __init__(self) -> None:
        self._changes = Changes()
        self._shared = 0
        self._exclusive = False
        self._waiting = 0

    @asynccontextmanager
    async def shared(self, *, pass_waiting: bool = False) -> AsyncIterator[None]:
        while self._exclusive or (self._waiting and not pass_waiting):
            await self._changes.wait()
        self._shared += 1
        try:
            yield
        finally:
            self._shared -= 1
            self._changes.notify()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            while self._exclusive or self._shared:
                await self._changes.wait()
            self._exclusive = True
        finally:
            self._waiting -= 1
            self._changes.notify()
        try:
            yield
        finally:
            self._exclusive = False
            self._changes.notify()
