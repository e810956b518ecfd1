"""The program of one reward worker: load the function, then answer calls, in their order, until the pool goes away. Calls of an async function
are under way side by side.

Invariant: file descriptors 0 and 1 belong to the user's code (nothing to read, prints go to standard error); the frames
use private copies that no child process inherits. The worker never outlives the pool: the kernel kills it when the
parent dies, even in the middle of a call, and it ends itself when its requests end.
"""

import ctypes
import inspect
import io
import os
import pickle
import resource
import signal
import sys
import time
from typing import BinaryIO

from grpo_worker.errors import GRPOError
from grpo_worker.functions import traceback_tail
from grpo_worker.rewards.base import RewardFunction
from grpo_worker.rewards.lookup import resolve
from grpo_worker.rewards.replies import failed, read_frame, scored, send
from grpo_worker.rewards.wire import Failed, LoadFailed, NotNow, Ready, Scored, Setup

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# When memory runs out, the kernel should take a worker, which is replaced, before the pool's process (1000: first).
_OOM_SCORE = b"700"


def main() -> None:
    requests, replies = _claim_pipes()
    _die_with_parent()
    body = read_frame(requests)
    if body is None:
        return
    setup: Setup = pickle.loads(body)
    _limit_resources(setup.memory_limit_bytes)
    try:
        function = resolve(setup.function_name, setup.options)
    except GRPOError as error:
        send(replies, LoadFailed(str(error)))
        return
    except BaseException as error:
        send(replies, LoadFailed(f"reward.function: {setup.function_name!r} failed to load:\n{traceback_tail(error)}"))
        return
    if inspect.iscoroutinefunction(function):
        send(replies, Ready(setup.concurrency))
        from grpo_worker.rewards.async_worker import serve  # asyncio alone takes longer to import than the rest

        serve(function, setup, requests, replies)
        return
    send(replies, Ready())
    while (body := read_frame(requests)) is not None:
        send(replies, _call(function, body))


def _call(function: RewardFunction, body: bytes) -> Scored | NotNow | Failed:
    start = time.perf_counter()
    try:
        result = function(pickle.loads(body))
    except BaseException as error:  # sys.exit() in a verifier is a failed call, not the end of the worker
        return failed(error, time.perf_counter() - start)
    return scored(result, time.perf_counter() - start)


def _claim_pipes() -> tuple[BinaryIO, int]:
    requests, replies = os.dup(0), os.dup(1)  # os.dup: not inheritable by exec
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a killed worker's prints are not lost

    def close_in_child() -> None:
        os.close(requests)
        os.close(replies)

    os.register_at_fork(
        after_in_child=close_in_child
    )  # multiprocessing's children neither write frames nor hold the pipe open
    return os.fdopen(requests, "rb", closefd=False), replies


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _limit_resources(memory_limit_bytes: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a verifier that segfaults for each sample must not fill the disk
    if memory_limit_bytes is not None:
        # What it writes to, not its address space: torch and CUDA reserve far more of that than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    if sys.platform == "linux":
        try:
            with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
                file.write(_OOM_SCORE)
        except OSError as error:  # a locked-down /proc: the worker works as well without
            print(f"reward worker: oom_score_adj not set: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
