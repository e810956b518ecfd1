"""The thread in which agents run.

Invariant: whatever a person's agent does in it, the coordinator's own event loop goes on, and the process can end. Agents share one event
loop, so one that blocks it stops the others; `replace` leaves such a thread behind (a thread cannot be killed) and says who blocked it.
"""

import asyncio
import contextlib
import contextvars
import copy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TICK_SECONDS = 0.2
STACK_LINES = 8
_NAME: "contextvars.ContextVar[str]" = contextvars.ContextVar("agent", default="")


@dataclass(frozen=True)
class Blocker:
    """Whose code has the loop, and where in it."""

    name: str
    stack: str  # its last lines


class AgentThread:
    """One event loop in a daemon thread, with a tokenizer of its own (tokenizers are not safe to share between threads)."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.abandoned = False
        self.blocker: Blocker | None = None  # known once abandoned, when somebody's code was running
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_DaemonThreads())
        self._loop.set_task_factory(_named_task)
        self._stopped = False
        self._ticked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="agents", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, None], name: str) -> "Future[None]":
        """Run a coroutine in the thread. It and the tasks that it makes go by `name`."""
        context = contextvars.copy_context()
        context.run(_NAME.set, name)
        return context.run(asyncio.run_coroutine_threadsafe, coroutine, self._loop)

    @property
    def silent_seconds(self) -> float:
        """For how long the loop has not come round."""
        return time.monotonic() - self._ticked

    def abandon(self) -> None:
        """Use it no more: its tasks are cancelled and it ends, as soon as its loop comes round."""
        self.abandoned, self.blocker = True, self._running()
        self._loop.call_soon_threadsafe(self._stop)

    def _running(self) -> Blocker | None:
        innermost = frame = sys._current_frames().get(self._thread.ident or 0)
        while frame is not None and frame.f_code is not _named.__code__:
            frame = frame.f_back
        if frame is None:
            return None
        stack = "".join(traceback.format_stack(innermost)).rstrip().splitlines()
        return Blocker(frame.f_locals["name"], "\n".join(stack[-STACK_LINES:]))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._tick)
        while not self._stopped:
            with contextlib.suppress(
                SystemExit, KeyboardInterrupt
            ):  # of a task that an agent made: it has the exception too
                self._loop.run_forever()

    def _tick(self) -> None:
        self._ticked = time.monotonic()
        self._loop.call_later(TICK_SECONDS, self._tick)

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_later(TICK_SECONDS, self._end)

    def _end(self) -> None:
        self._stopped = True
        for task in asyncio.all_tasks(self._loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it was asked to end; no complaint when it is dropped
        self._loop.stop()


class AgentRuntime:
    """The thread in use. One for the whole coordinator: training and validation share it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # never used itself, only copied
        self.thread = AgentThread(copy.deepcopy(self._tokenizer))

    def replace(self) -> None:
        """Leave the thread behind and go on with a fresh one."""
        self.thread.abandon()
        self.thread = AgentThread(copy.deepcopy(self._tokenizer))

    def close(self) -> None:
        self.thread.abandon()


async def _named(coroutine: Coroutine[Any, Any, Any], name: str) -> Any:
    """On the stack of whatever `coroutine` runs, where another thread finds the name."""
    return await coroutine


def _named_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **keywords: Any) -> "asyncio.Task[Any]":
    return asyncio.Task(_named(coroutine, _NAME.get()), loop=loop, **keywords)


class _DaemonThreads(ThreadPoolExecutor):
    """For `asyncio.to_thread` in an agent: a thread a call, which does not keep the process from ending when the call hangs."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> "Future[Any]":
        future: Future[Any] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*arguments, **keywords)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=call, name="agents-to-thread", daemon=True).start()
        return future
