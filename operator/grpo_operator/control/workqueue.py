"""A queue of keys that want work.

Invariant: a key is worked on by one worker at a time; asked for while waiting it waits once, asked for while worked on it is worked on once
more. A key whose work failed comes back after a pause that doubles, with jitter, and every failure of other keys leaves it alone.
(The rules of client-go's rate-limited work queue.)
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Not thread-safe: all calls come from one event loop."""

    def __init__(self, first_pause_seconds: float = 0.5, longest_pause_seconds: float = 120.0) -> None:
        self._first_pause, self._longest_pause = first_pause_seconds, longest_pause_seconds
        self._waiting: deque[K] = deque()
        self._wanted: dict[K, float] = {}  # since when (loop time): waiting, or asked for again while worked on
        self._working: dict[K, float] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._news = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: K) -> None:
        """As soon as a worker is free. It also replaces the key's timer: the work that follows asks for a new one."""
        if self._closed or key in self._wanted:
            return
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        self._wanted[key] = asyncio.get_running_loop().time()
        if key not in self._working:
            self._waiting.append(key)
            self._news.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Not before `seconds`; an earlier timer of the key stays."""
        if self._closed or key in self._wanted:
            return
        loop = asyncio.get_running_loop()
        due, timer = loop.time() + max(0.0, seconds), self._timers.get(key)
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._due, key)

    def _due(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def failed(self, key: K) -> float:
        """Count a failure and come back later; returns the pause in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        pause = min(self._first_pause * 2 ** min(failures - 1, 30), self._longest_pause) * random.uniform(1.0, 1.3)
        self.add_after(key, pause)
        return pause

    def succeeded(self, key: K) -> None:
        self._failures.pop(key, None)

    async def get(self) -> K | None:
        """The next key, to be given back with `done`; None once the queue is closed."""
        while not self._waiting:
            if self._closed:
                return None
            self._news.clear()
            await self._news.wait()
        if self._closed:
            return None
        key = self._waiting.popleft()
        del self._wanted[key]
        self._working[key] = asyncio.get_running_loop().time()
        return key

    def done(self, key: K) -> None:
        del self._working[key]
        if key in self._wanted:
            self._waiting.append(key)
            self._news.set()

    def close(self) -> None:
        """No more keys are taken or given out; those in work are finished by their workers."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._news.set()

    def oldest_waiting_seconds(self) -> float:
        """How long the longest waiting key has waited for a worker."""
        now = asyncio.get_running_loop().time()
        return max((now - since for since in self._wanted.values()), default=0.0)

    def longest_working_seconds(self) -> float:
        """How long the longest work in hand takes already."""
        now = asyncio.get_running_loop().time()
        return max((now - since for since in self._working.values()), default=0.0)


async def work(queue: WorkQueue[K], reconcile: Callable[[K], Awaitable[float | None]]) -> None:
    """One worker: until the queue is closed. `reconcile` returns after how many seconds it wants the key again, if at all."""
    while (key := await queue.get()) is not None:
        again: float | None = None
        try:
            again = await reconcile(key)
        except Exception as error:  # whatever it was, the other keys go on and this one is tried again
            pause = queue.failed(key)
            words = str(error).rstrip(".") or type(error).__name__
            logger.error("%s: %s. Tried again in %.1f s.", key, words, pause, exc_info=not str(error))
        else:
            queue.succeeded(key)
        finally:
            queue.done(key)
        if again is not None:
            queue.add_after(key, again)
