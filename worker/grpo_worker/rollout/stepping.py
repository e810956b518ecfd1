"""The thread that steps vLLM's engine, in the server's own process.

Invariant: whatever touches the engine runs in this thread, between two steps, in the order in which it was asked for: what one call
does is one moment for every request. After a step has failed there is no further one, and all who wait or come are told.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from grpo_worker.rollout import metrics

log = logging.getLogger(__name__)

T = TypeVar("T")


class EngineThread:
    """Steps one `vllm.LLMEngine` while it has requests; sleeps while it has none."""

    def __init__(self, take: Callable[[list[Any]], None], failed: Callable[[], None]) -> None:
        """
        Args:
            take: gets the requests' outputs of each step. failed: is called once, when a step has failed. Both run in the thread.
        """
        self.engine: Any = None
        self.error: BaseException | None = None  # of the step that failed, or of the worker process that has gone
        self._take, self._failed = take, failed
        self._ended = False
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run it between two steps. What has not begun can be cancelled."""
        future: Future[T] = Future()
        self._work.put((future, lambda: function(*arguments)))
        return future

    async def between_steps(self, function: Callable[..., T], *arguments: Any) -> T:
        """`submit` and wait for the result. A function that has begun goes on when the waiter is cancelled."""
        return await asyncio.wrap_future(self.submit(function, *arguments))

    def create(self, make: Callable[[], Any]) -> None:
        """In the thread: make the engine, whose devices and compiled code belong to the thread that made it."""
        self.engine = make()
        # Workers of tensor parallelism are processes. One that goes while the engine is idle fails no step.
        self.engine.model_executor.register_failure_callback(
            lambda *_: self.fail(RuntimeError("a worker process of the engine has ended"))
        )

    def drain(self) -> None:
        """In the thread, with the scheduler paused: step until the batches under way have given their outputs."""
        while self._has_work():
            self._step()

    def end(self, timeout_seconds: float) -> None:
        """Take the engine down. An engine that is being made, or hangs in a step, is left to the end of the process."""
        if self.engine is None:
            return
        try:
            self.submit(self._shut_down).result(timeout_seconds)
        except Exception as error:
            log.warning("the engine was not shut down: %s: %s", type(error).__name__, error)

    def _shut_down(self) -> None:
        self._ended = True
        engine, self.engine = self.engine, None
        engine.engine_core.shutdown()

    def _run(self) -> None:
        while not self._ended:
            try:
                future, function = self._work.get(block=not self._has_work())
            except queue.Empty:
                self._step()
                continue
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del future, function  # what they hold goes now, not with the next one

    def _has_work(self) -> bool:
        if self.engine is None or self.error is not None:
            return False
        core = self.engine.engine_core.engine_core
        return bool(core.scheduler.has_requests() or core.batch_queue)

    def _step(self) -> None:
        began = time.monotonic()
        try:
            if outputs := self.engine.step():
                self._take(outputs)
        except BaseException as error:
            log.exception("the engine failed in a step")
            self.fail(error)
        metrics.BUSY_SECONDS.inc(time.monotonic() - began)

    def fail(self, error: BaseException) -> None:
        """The engine is of no use any more. From any thread."""
        if self.error is None:
            self.error = error
            self.submit(self._failed)
