"""Why a run may not go on: somebody asked for its end, or something beside the training failed.

Invariant: a step under way is finished, so that trainer and coordinator stay at one step; only what waits is broken off.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class Halt:
    """Set once, looked at between the parts of a step."""

    def __init__(self) -> None:
        self.reason = ""  # of the stop request
        self._error: Exception | None = None
        self._asked, self._failed = asyncio.Event(), asyncio.Event()
        self._woken: list[asyncio.Event] = [self._asked]

    @property
    def called(self) -> bool:
        return bool(self.reason) or self._error is not None

    def wakes(self, event: asyncio.Event) -> None:
        """`event` is set as well when the run may not go on."""
        self._woken.append(event)

    def ask(self, reason: str) -> None:
        """A person or a supervisor wants the end."""
        self.reason = self.reason or reason
        self._wake()

    async def watch(self, work: Coroutine[Any, Any, object]) -> None:
        """Run what serves the training beside it; its failure ends the run."""
        try:
            await work
        except Exception as error:
            self._error = self._error or error
            self._failed.set()
            self._wake()

    def raise_failure(self) -> None:
        """Raise what failed beside the training."""
        if self._error is not None:
            raise self._error

    async def unless(self, work: Coroutine[Any, Any, Result], *, asked: bool = True) -> Result | None:
        """The result of `work`; None when a stop request comes first (and counts: `asked`). Raises what failed beside the training."""
        events = [self._failed, *([self._asked] if asked else [])]
        task = asyncio.create_task(work)
        tasks: list[asyncio.Task[Any]] = [task, *(asyncio.create_task(event.wait()) for event in events)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.raise_failure()
                return None
            return task.result()
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _wake(self) -> None:
        for event in self._woken:
            event.set()
