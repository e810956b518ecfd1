"""One worker process as the pool sees it: frames out, replies in, a deadline, and one notice when it is lost.

Invariant: `on_lost` is called exactly once for each worker that was not stopped by the pool, after every reply that it
sent. From then on its whole process group, and whatever has inherited its environment, has been sent SIGKILL: verifiers start
processes of their own, some of them in sessions of their own.
"""

import asyncio
import os
import pickle
import signal
import sys
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from grpo_worker.rewards.wire import DamagedReplyError, FrameReader, Reply, Setup, decode_reply, frame

_LATE_REPLY_SECONDS = 0.05  # a reply that arrived while the event loop was busy is read before its call is judged
_REAP_SECONDS = 5.0
_STDIN, _STDOUT = 0, 1
# The worker runs code that nobody vouches for, in part written by the model: it has no use for the job's token.
_WITHHELD_VARIABLES = ("GRPO_JOB_TOKEN",)
# By which the processes that a worker has started are known, wherever they have gone.
_MARK = "GRPO_REWARD_WORKER"


@dataclass(frozen=True)
class Loss:
    kind: Literal["timeout", "crash"]
    message: str


class WorkerProcess(asyncio.SubprocessProtocol):
    """`python -m grpo_worker.rewards.worker` in a session of its own."""

    def __init__(
        self,
        setup: Setup,
        on_replies: Callable[["WorkerProcess", list[Reply]], None],
        on_lost: Callable[["WorkerProcess", Loss], None],
    ) -> None:
        self._setup = setup
        self._on_replies = on_replies
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._frames = FrameReader()
        self.mark = f"{_MARK}={uuid.uuid4().hex}"
        self._transport: asyncio.SubprocessTransport | None = None
        self._silent = False  # lost or stopped: nothing more is reported
        self._deadline: float | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._deadline_passed = False
        self._reap_timer: asyncio.TimerHandle | None = None
        self.gone: asyncio.Future[None] = self._loop.create_future()

    @property
    def alive(self) -> bool:
        """Started and not yet reaped."""
        return self._transport is not None and not self.gone.done()

    async def spawn(self) -> None:
        """Starts the process; its Ready arrives as the first reply.

        The kernel ties a worker to the *thread* that started it (PR_SET_PDEATHSIG): the event loop's, which lives as
        long as the pool.

        Raises:
            OSError: the process could not be started.
        """
        environment = {key: value for key, value in os.environ.items() if key not in _WITHHELD_VARIABLES}
        environment[_MARK] = self.mark.removeprefix(f"{_MARK}=")
        environment.setdefault("OMP_NUM_THREADS", "1")  # parallelism comes from the number of workers
        await self._loop.subprocess_exec(
            lambda: self,
            sys.executable,
            "-P",  # the user's folder goes on sys.path when the function is looked up, not before our own imports
            "-m",
            "grpo_worker.rewards.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=None,
            start_new_session=True,
            env=environment,
        )

    def send(self, bodies: list[bytes]) -> None:
        if self._transport is not None and not self._silent:
            pipe = cast(asyncio.WriteTransport, self._transport.get_pipe_transport(_STDIN))
            pipe.write(b"".join(map(frame, bodies)))

    def set_deadline(self, seconds: float | None) -> None:
        """The worker is killed in `seconds` from now, unless this is called again; None takes the limit off."""
        self._deadline = None if seconds is None else self._loop.time() + seconds
        self._deadline_passed = False
        if self._deadline is None:
            return
        # A timer that fires too early looks again: moving the deadline back, as each reply does, costs nothing.
        if self._deadline_timer is not None and self._deadline_timer.when() > self._deadline:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if self._deadline_timer is None:
            self._deadline_timer = self._loop.call_at(self._deadline, self._check_deadline)

    def close_requests(self) -> None:
        """Asks an idle worker to end (exit handlers of the user's code run), without another notice."""
        self._silence()
        if self._transport is not None and (pipe := self._transport.get_pipe_transport(_STDIN)) is not None:
            pipe.close()

    def kill(self) -> None:
        """SIGKILL to the process group and whatever else the worker has started, without another notice."""
        self.kill_group()
        kill_started_with({self.mark})

    def kill_group(self) -> None:
        """SIGKILL to the process group alone, without another notice."""
        self._silence()
        self._kill_group()

    # --- asyncio.SubprocessProtocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)
        if self._silent:
            self._kill_group()
            return
        self.send([pickle.dumps(self._setup)])

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if self._silent:
            return
        try:
            replies = [decode_reply(body) for body in self._frames.feed(data)]
        except DamagedReplyError as error:
            self._lose(Loss("crash", f"the worker's reply is damaged: {error}"))
            return
        if replies:
            self._on_replies(self, replies)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == _STDOUT:
            self._end()

    def process_exited(self) -> None:
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        code = self._transport.get_returncode() if self._transport is not None else None
        self._lose(Loss("crash", f"the worker process {_describe_exit(code)}"))
        if self._reap_timer is not None:
            self._reap_timer.cancel()
        if self._transport is not None:
            self._transport.close()
        if not self.gone.done():
            self.gone.set_result(None)

    # --- the end ---

    def _end(self) -> None:
        """The process ended or closed its replies. Its children may still hold the pipe, so the group goes too."""
        self._kill_group()
        if self._reap_timer is None:
            lost = Loss("crash", "the worker process closed its replies")
            self._reap_timer = self._loop.call_later(_REAP_SECONDS, self._lose, lost)

    def _check_deadline(self) -> None:
        self._deadline_timer = None
        if self._deadline is None or self._silent:
            return
        if self._loop.time() < self._deadline:
            self._deadline_timer = self._loop.call_at(self._deadline, self._check_deadline)
        elif not self._deadline_passed:
            self._deadline_passed = True
            self._deadline_timer = self._loop.call_later(_LATE_REPLY_SECONDS, self._check_deadline)
        else:
            self._lose(Loss("timeout", "the time limit was reached"))

    def _lose(self, loss: Loss) -> None:
        if not self._silent:
            self.kill()
            self._on_lost(self, loss)

    def _silence(self) -> None:
        self._silent = True
        self._deadline = None
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None

    def _kill_group(self) -> None:
        if self._transport is None or self.gone.done():
            return
        # The group may be empty already (macOS says EPERM while its leader is not reaped).
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._transport.get_pid(), signal.SIGKILL)


def kill_started_with(variables: Collection[str], number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to the processes, but this one, that were started with one of these (NAME=VALUE) in their environment; to none where there is
    no /proc. Reads all of /proc: once for many."""
    wanted = {variable.encode() for variable in variables}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or another user's
            process = int(directory.name)
            if process != os.getpid() and not wanted.isdisjoint((directory / "environ").read_bytes().split(b"\0")):
                os.kill(process, number)


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "ended"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
