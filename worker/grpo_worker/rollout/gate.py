"""Who may put work into the engine when.

Invariant: while an exclusive holder runs (an atomic request, whose batches must depend on nothing else) nobody else is
inside. A waiting exclusive holder keeps newcomers out, so it is not starved; a weight update may pass those who wait,
but not one who runs.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Many shared holders, or one exclusive. Waiting is bounded by the caller's `asyncio.timeout`."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._shared = 0
        self._exclusive = False
        self._waiting = 0

    @asynccontextmanager
    async def shared(self, *, pass_waiting: bool = False) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._exclusive and (pass_waiting or not self._waiting))
            self._shared += 1
        try:
            yield
        finally:
            self._shared -= 1
            await self._notify()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        async with self._changed:
            self._waiting += 1
            try:
                await self._changed.wait_for(lambda: not self._exclusive and self._shared == 0)
                self._exclusive = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            self._exclusive = False
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
