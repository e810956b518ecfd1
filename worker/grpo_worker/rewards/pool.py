"""Scores samples in killable worker processes: asyncio in front, a time limit on each call behind.

Invariant: each sample given to the pool ends as exactly one RewardOutcome, a result or a failure with its kind. One more
call is made for it after a crash (first of all on a fresh worker: the same sample crashing twice is no accident), and
more of them, ever further apart, while the function asks for that (TryAgain) and its time is not over; meanwhile the
sample holds no worker. A worker that hangs or dies takes one sample with it; the others it had been sent go back to the
head of the queue. The event loop never waits.
"""

import asyncio
import math
import os
import pickle
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpo_worker.errors import DataError, RetryableError, UsageError
from grpo_worker.rewards.base import RewardInput, RewardResult
from grpo_worker.rewards.process import Loss, WorkerProcess, kill_started_with
from grpo_worker.rewards.wire import Failed, FailureKind, LoadFailed, NotNow, Ready, Reply, Scored, Setup

# A worker is sent calls ahead, so that it need not wait for the pool between two fast ones: this many seconds' worth,
# at most so many.
_AHEAD_SECONDS = 0.05
_AHEAD_CALLS = 64
# Pause before a call is made again after TryAgain: doubled each time, spread so that a judge that comes back is not met
# by all samples at once.
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_NOTICE_SECONDS = 60.0
_LOOP_SECONDS = 10.0
# Replacements that fail to start in a row before the pool gives up, and the pause before each new try.
_START_TRIES = 4
_RESTART_PAUSE_SECONDS = 0.5
# close() within 5 seconds: first for exit handlers, then for the kernel.
_EXIT_SECONDS = 1.0
_KILL_SECONDS = 3.0


def memory_share(workers: int, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes for each of so many workers: half of what this container may have, or of the machine, and never less than 1 GiB.

    A container over its limit is ended whole, coordinator and all.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        with suppress(OSError, ValueError):  # "max": none
            limits.append(int((cgroup / name).read_text()))
    return max(min(limits) // 2 // workers, 1 << 30)


@dataclass(frozen=True)
class RewardFailure:
    """Why a sample has no score. `message` is for people: the end of the traceback, the signal, the limit."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class RewardOutcome:
    """Either `result` or `failure`; `seconds` is the time inside the reward function, `refusals` how often it asked for another try."""

    result: RewardResult | None
    failure: RewardFailure | None
    seconds: float
    refusals: int = 0


class PoolClosedError(RuntimeError):
    """The pool was closed before the sample was scored."""


@dataclass(eq=False)
class _Call:
    sample: RewardInput
    outcome: asyncio.Future[RewardOutcome]
    crashes: int = 0
    refusals: int = 0  # TryAgain
    give_up_time: float = math.inf  # on the event loop's clock; set by the first refusal


@dataclass(eq=False)
class _Slot:
    """A place for a worker; its worker is replaced when lost."""

    worker: WorkerProcess | None = None
    ready: bool = False
    calls: int = 1  # that the worker takes at a time
    sent: deque[_Call] = field(default_factory=deque)  # the first one is being computed
    retry: _Call | None = None  # crashed a worker once; runs first on the next


class RewardPool:
    """`workers` processes that each loaded the function `function_name` with `options` (see lookup.resolve).

    `timeout_seconds` limits each call, `startup_timeout_seconds` the loading of the function (imports included).
    `retry_seconds`: for so long a call that raises TryAgain is made again; `on_refusal` hears of it, once a minute at
    most. `memory_limit_bytes` caps what a worker may write to (RLIMIT_DATA), so that a runaway verifier gets a MemoryError. Use
    from one event loop:

        async with RewardPool("gsm8k", {}, workers=2, timeout_seconds=5, startup_timeout_seconds=60) as pool:
            outcomes = await pool.score_many(samples)
    """

    def __init__(
        self,
        function_name: str,
        options: dict[str, Any],
        workers: int,
        timeout_seconds: float,
        startup_timeout_seconds: float,
        *,
        retry_seconds: float = 0.0,
        on_refusal: Callable[[str], None] = lambda message: None,
        memory_limit_bytes: int | None = None,
        concurrency: int = 1,
    ) -> None:
        for name, value in (
            ("reward.workers", workers),
            ("reward.timeoutSeconds", timeout_seconds),
            ("failurePolicy.startupTimeoutSeconds", startup_timeout_seconds),
        ):
            if not value > 0:
                raise UsageError(f"{name}: {value} is not above 0.")
        self.function_name = function_name
        self._setup = Setup(function_name, options, memory_limit_bytes, concurrency, timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self._startup_timeout_seconds = startup_timeout_seconds
        self._retry_seconds = retry_seconds
        self._on_refusal = on_refusal
        self._slots = [_Slot() for _ in range(workers)]
        self._queue: deque[_Call] = deque()
        self._resting: dict[_Call, asyncio.TimerHandle] = {}  # refused by the function, to be called again
        self._tasks: set[asyncio.Task[None]] = set()
        self._processes: set[WorkerProcess] = set()  # in the slots, or killed and not yet reaped
        self._started: asyncio.Future[None] | None = None
        self._running = False
        self._dispatching = False
        self._start_failures = 0
        self._broken: Exception | None = None
        self._closed = False
        self._next_notice = 0.0
        self._answered = 0  # calls that came back with an answer, and their seconds: how far to send ahead
        self._answered_seconds = 0.0

    async def start(self) -> None:
        """Starts all workers at once and waits until each has loaded the function.

        Raises:
            DataError: the function does not load (the end of the user's traceback is in the message), or not within the
            limit.
        """
        self._started = asyncio.get_running_loop().create_future()
        for slot in self._slots:
            self._start_worker(slot)
        try:
            await self._started
        except BaseException:
            await self.close()
            raise

    async def score_many(self, samples: Sequence[RewardInput]) -> list[RewardOutcome]:
        """The outcomes in the order of the samples.

        Raises RetryableError when no worker can be started any more, PoolClosedError after close().
        """
        return await asyncio.gather(*[self._submit(sample) for sample in samples])

    async def close(self) -> None:
        """Ends all workers and their children within 5 seconds. Calls not yet answered raise PoolClosedError."""
        self._closed = True
        self._abandon(PoolClosedError("the reward pool was closed before the sample was scored"))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_EXIT_SECONDS)
        for slot in self._slots:
            if slot.worker is not None:
                if slot.ready and not slot.sent:
                    slot.worker.close_requests()
                else:
                    slot.worker.kill_group()
                slot.sent.clear()
        marks = {worker.mark for worker in self._processes}
        if alive := [worker for worker in self._processes if worker.alive]:
            await asyncio.wait([worker.gone for worker in alive], timeout=_EXIT_SECONDS)
            for worker in alive:
                worker.kill_group()
            await asyncio.wait([worker.gone for worker in alive], timeout=_KILL_SECONDS)
        if marks:
            kill_started_with(marks)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- calls ---

    def _submit(self, sample: RewardInput) -> asyncio.Future[RewardOutcome]:
        if not self._running:
            raise RuntimeError("score() before start() has returned")
        outcome: asyncio.Future[RewardOutcome] = asyncio.get_running_loop().create_future()
        if self._closed:
            outcome.set_exception(PoolClosedError("the reward pool is closed"))
        elif self._broken is not None:
            outcome.set_exception(self._broken)
        else:
            self._queue.append(_Call(sample, outcome))
            if not self._dispatching:
                self._dispatching = True
                asyncio.get_running_loop().call_soon(self._dispatch)
        return outcome

    def _dispatch(self) -> None:
        self._dispatching = False
        for slot in self._slots:
            if not self._queue:
                return
            self._fill(slot)

    def _limit(self, slot: _Slot) -> float:
        """Until the next reply. A worker that has calls side by side judges each of them itself, unless its event loop stands still."""
        return self._timeout_seconds if slot.calls == 1 else 2 * self._timeout_seconds + _LOOP_SECONDS

    def _calls_ahead(self, slot: _Slot) -> int:
        """Enough fast calls to keep a worker busy, one slow call at a time, no more than its share of the queue; twice what it takes side
        by side, since it answers in order."""
        mean_seconds = self._answered_seconds / self._answered if self._answered else _AHEAD_SECONDS
        by_time = int(_AHEAD_SECONDS / max(mean_seconds, 1e-9))
        share = math.ceil(len(self._queue) / len(self._slots))
        if slot.calls > 1:
            return max(1, min(2 * slot.calls, len(slot.sent) + share))
        return max(1, min(_AHEAD_CALLS, by_time, share))

    def _fill(self, slot: _Slot) -> None:
        if slot.worker is None or not slot.ready or slot.retry is not None:
            return
        limit = self._calls_ahead(slot)
        if len(slot.sent) > limit // 2:
            return  # top up by half windows: fewer, larger writes
        self._send(slot, limit - len(slot.sent))

    def _send(self, slot: _Slot, count: int) -> None:
        bodies: list[bytes] = []
        was_idle = not slot.sent
        while self._queue and len(bodies) < count:
            call = self._queue.popleft()
            if call.outcome.done():  # the caller has gone
                continue
            try:
                body = pickle.dumps(call.sample)
            except Exception as error:
                self._fail(
                    call, "exception", f"the sample cannot be sent to a worker: {type(error).__name__}: {error}", 0.0
                )
                continue
            bodies.append(body)
            slot.sent.append(call)
        if bodies and slot.worker is not None:
            slot.worker.send(bodies)
            if was_idle:
                slot.worker.set_deadline(self._limit(slot))

    def _settle(self, call: _Call, outcome: RewardOutcome) -> None:
        if not call.outcome.done():
            call.outcome.set_result(outcome)

    def _fail(self, call: _Call, kind: FailureKind, message: str, seconds: float) -> None:
        self._settle(call, RewardOutcome(None, RewardFailure(kind, message), seconds, call.refusals))

    def _abandon(self, error: Exception) -> None:
        """Every waiting caller gets `error`."""
        calls = [*self._queue, *self._resting]
        self._queue.clear()
        for timer in self._resting.values():
            timer.cancel()
        self._resting.clear()
        for slot in self._slots:
            calls += [*slot.sent, *([slot.retry] if slot.retry is not None else [])]
            slot.retry = None
        for call in calls:
            if not call.outcome.done():
                call.outcome.set_exception(error)

    # --- workers ---

    def _start_worker(self, slot: _Slot) -> None:
        slot.ready = False
        worker = WorkerProcess(self._setup, partial(self._replied, slot), partial(self._lost, slot))
        slot.worker = worker
        self._processes.add(worker)
        worker.gone.add_done_callback(lambda _: self._processes.discard(worker))
        worker.set_deadline(self._startup_timeout_seconds)
        self._run(self._spawn(slot, worker))

    async def _spawn(self, slot: _Slot, worker: WorkerProcess) -> None:
        try:
            await worker.spawn()
        except OSError as error:
            worker.kill()
            self._processes.discard(worker)
            self._start_failed(slot, RetryableError(f"a reward worker process could not be started: {error}."))

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _replied(self, slot: _Slot, worker: WorkerProcess, replies: list[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Ready) and not slot.ready:
                slot.calls = reply.calls
                self._worker_ready(slot)
            elif isinstance(reply, LoadFailed) and not slot.ready:
                worker.kill()
                self._start_failed(slot, DataError(reply.message))
                return
            elif isinstance(reply, Scored | NotNow | Failed) and slot.sent:
                self._answer(slot.sent.popleft(), reply)
            else:
                worker.kill()
                self._lost(slot, worker, Loss("crash", "the worker sent a reply that no call asked for"))
                return
        worker.set_deadline(self._limit(slot) if slot.sent else None)
        self._fill(slot)

    def _answer(self, call: _Call, reply: Scored | NotNow | Failed) -> None:
        self._answered += 1
        self._answered_seconds += reply.seconds
        if isinstance(reply, Failed):
            self._fail(call, reply.kind, reply.message, reply.seconds)
        elif isinstance(reply, NotNow):
            self._rest_or_give_up(call, reply)
        else:
            result = RewardResult(reply.score, reply.accuracy, reply.extra, reply.answer)
            self._settle(call, RewardOutcome(result, None, reply.seconds, call.refusals))

    def _rest_or_give_up(self, call: _Call, reply: NotNow) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        call.refusals += 1
        if call.refusals == 1:
            call.give_up_time = now + self._retry_seconds
        if now >= call.give_up_time:
            message = f"asked to be tried again {call.refusals} times in {self._retry_seconds:g} s (reward.retrySeconds): {reply.message}"
            self._fail(call, "unavailable", message, reply.seconds)
            return
        if now >= self._next_notice:
            self._next_notice = now + _NOTICE_SECONDS
            self._on_refusal(reply.message)
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(call.refusals - 1, 32), _LONGEST_PAUSE_SECONDS)
        again = min(now + pause * random.uniform(0.5, 1.0), call.give_up_time)  # the last call is at the bound
        self._resting[call] = loop.call_at(again, self._call_again, call)

    def _call_again(self, call: _Call) -> None:
        del self._resting[call]
        self._queue.append(call)
        self._dispatch()

    def _worker_ready(self, slot: _Slot) -> None:
        slot.ready = True
        self._start_failures = 0
        if self._started is not None and not self._started.done() and all(each.ready for each in self._slots):
            self._running = True
            self._started.set_result(None)
        if slot.retry is not None:
            self._queue.appendleft(slot.retry)
            slot.retry = None
            self._send(slot, 1)

    def _lost(self, slot: _Slot, worker: WorkerProcess, loss: Loss) -> None:
        if self._closed:
            return
        if not slot.ready or not self._running:
            name = self._setup.function_name
            if loss.kind == "timeout":
                text = (
                    f"reward.function: {name!r} was not loaded within {self._startup_timeout_seconds:g} s."
                    " Load big files on first use, or raise failurePolicy.startupTimeoutSeconds."
                )
            else:
                text = f"reward.function: {name!r}: {loss.message} while it loaded the function. Its output is above."
            self._start_failed(slot, DataError(text))
            return
        sent, slot.sent = slot.sent, deque()
        if sent:
            call = sent.popleft()
            self._queue.extendleft(reversed(sent))
            self._give_up_or_retry(slot, call, loss)
        self._start_worker(slot)
        self._dispatch()

    def _give_up_or_retry(self, slot: _Slot, call: _Call, loss: Loss) -> None:
        if loss.kind == "timeout":
            message = f"no result within {self._timeout_seconds:g} s (reward.timeoutSeconds); the worker was killed"
            self._fail(call, "timeout", message, self._timeout_seconds)
            return
        call.crashes += 1
        if call.crashes > 1:
            self._fail(call, "crash", f"{loss.message}, twice, on this sample", 0.0)
        else:
            slot.retry = call

    def _start_failed(self, slot: _Slot, error: Exception) -> None:
        """At the pool's start the first failure is final; a replacement may fail by accident and is tried again."""
        if self._closed:
            return
        if not self._running:
            if self._started is not None and not self._started.done():
                self._started.set_exception(error)
            return
        self._start_failures += 1
        if self._start_failures >= _START_TRIES:
            self._broken = RetryableError(
                f"reward workers cannot be started any more ({self._start_failures} tries): {error}"
            )
            self._abandon(self._broken)
            return
        self._run(self._start_again(slot, _RESTART_PAUSE_SECONDS * 2 ** (self._start_failures - 1)))

    async def _start_again(self, slot: _Slot, pause_seconds: float) -> None:
        await asyncio.sleep(pause_seconds)
        self._start_worker(slot)
