"""Calls to the trainer (rank 0), one at a time.

Invariant: a call ends with the trainer's reply, with the trainer's own error (its reason and exit code), or with `TrainerLost`; never
with a guess. The trainer's state is tied to this coordinator's, so a lost trainer ends the coordinator too: both restart from the
last checkpoint.
"""

import asyncio
from typing import Any, TypeVar

from grpo_worker.coordinator.member_client import LateError, MemberClient
from grpo_worker.coordinator.members import Member, Members
from grpo_worker.errors import ExitCode, GRPOError, PeerLostError, RetryableError
from grpo_worker.protocol.http import RefusedError
from grpo_worker.protocol.messages import Done, ErrorReply, SaveStatusRequest, StopRequest

PATH = "/v1/trainer"
STOP_SECONDS = 10.0

Reply = TypeVar("Reply")


class TrainerLost(RetryableError):
    """The trainer died or does not answer."""

    reason = "TrainerLost"


class TrainerFailed(GRPOError):
    """The trainer reported an error of its own."""

    def __init__(self, error: ErrorReply) -> None:
        super().__init__(error.message)
        self.reason = error.reason
        self.exit_code = ExitCode(error.exit_code) if error.exit_code in {*ExitCode} else ExitCode.RETRY
        self.recoverable = error.recoverable


class TrainerClient:
    """RPC to the trainer that registered first; a trainer that restarts behind our back has lost our state."""

    def __init__(self, client: MemberClient, members: Members, timeout_seconds: float) -> None:
        self._client = client
        self._members = members
        self._timeout_seconds = timeout_seconds
        self._member: Member | None = None
        self._lock = asyncio.Lock()

    async def connect(self, timeout_seconds: float) -> None:
        """Wait for the trainer's first heartbeat as ready. Raises TrainerLost."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while not (alive := self._members.alive("trainer")):
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise TrainerLost(
                    f"no trainer was ready within {timeout_seconds:.0f} s (failurePolicy.startupTimeoutSeconds). See trainer-0.log."
                )
            await self._members.wait(min(left, 1.0))
        self._member = alive[0]

    async def call(self, request: Any, reply: type[Reply], timeout_seconds: float | None = None) -> Reply:
        """One operation. Raises TrainerLost, TrainerFailed."""
        if isinstance(request, SaveStatusRequest):  # answered beside whatever the trainer works on
            return await self._call(request, reply, timeout_seconds or self._timeout_seconds)
        async with self._lock:
            return await self._call(request, reply, timeout_seconds or self._timeout_seconds)

    async def stop(self) -> str:
        """Ask the trainer to end; its name when it has heard. It may be gone already, or still be loading."""
        if self._member is None:
            return ""
        try:
            await self._call(StopRequest(), Done, STOP_SECONDS)
        except GRPOError:
            return ""
        return self._member.name

    async def _call(self, request: Any, reply: type[Reply], timeout_seconds: float) -> Reply:
        assert self._member is not None, "connect() first"
        what = str(request.__struct_config__.tag)
        try:
            answer: Reply = await self._client.ask(self._member, PATH, request, reply, timeout_seconds, what)
            return answer
        except RefusedError as error:
            raise TrainerFailed(error.reply) from error
        except LateError as error:
            raise TrainerLost(f"{error}: {timeout_seconds:.0f} s (network.requestTimeoutSeconds)") from error
        except PeerLostError as error:
            raise TrainerLost(f"{error}. See trainer-0.log.") from error
