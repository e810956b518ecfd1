"""Calls to the trainer (rank 0), one at a time.

Invariant: a call ends with the trainer's reply, with the trainer's own error (its reason and exit code), or with `TrainerLost`; never
with a guess. The trainer's state is tied to this coordinator's, so a lost trainer ends the coordinator too: both restart from the
last checkpoint.
"""

import asyncio
from typing import Any, TypeVar

import aiohttp
import msgspec

from grpo_worker.coordinator.members import Member, Members
from grpo_worker.errors import ExitCode, GRPOError, RetryableError
from grpo_worker.protocol import codec
from grpo_worker.protocol.auth import authorization
from grpo_worker.protocol.messages import RemoteError, SaveStatusRequest, StopRequest, TrainerReply

Reply = TypeVar("Reply")


class TrainerLost(RetryableError):
    """The trainer died or does not answer."""

    reason = "TrainerLost"


class TrainerFailed(GRPOError):
    """The trainer reported an error of its own."""

    def __init__(self, error: RemoteError) -> None:
        super().__init__(error.message)
        self.reason = error.reason
        self.exit_code = ExitCode(error.exit_code) if error.exit_code in {*ExitCode} else ExitCode.RETRY
        self.recoverable = error.recoverable


class TrainerClient:
    """RPC to the trainer that registered first; a trainer that restarts behind our back has lost our state."""

    def __init__(self, session: aiohttp.ClientSession, members: Members, token: str, timeout_seconds: float) -> None:
        self._session = session
        self._members = members
        self._headers = {**authorization(token), "Content-Type": codec.CONTENT_TYPE}
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
            await self._post(self._member, StopRequest(), 10.0)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return ""
        return self._member.name

    async def _call(self, request: Any, reply: type[Reply], timeout_seconds: float) -> Reply:
        member = self._member
        assert member is not None, "connect() first"
        name = type(request).__name__.removesuffix("Request")
        post = asyncio.create_task(self._post(member, request, timeout_seconds))
        try:
            while not post.done():
                await asyncio.wait({post}, timeout=1.0)
                if not post.done() and not self._members.is_current(member):
                    raise TrainerLost(f"the trainer restarted or fell silent during {name}. See trainer-0.log.")
            answer = post.result()
        except TimeoutError:
            raise TrainerLost(
                f"the trainer did not finish {name} within {timeout_seconds:.0f} s (network.requestTimeoutSeconds)."
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise TrainerLost(
                f"the trainer at {member.url} died during {name}: {error or type(error).__name__}. See trainer-0.log."
            ) from error
        except msgspec.DecodeError as error:
            raise TrainerLost(
                f"the trainer's answer to {name} cannot be read ({error}): not the same version of this program?"
            ) from error
        finally:
            post.cancel()
        if isinstance(answer, RemoteError):
            raise TrainerFailed(answer)
        if not isinstance(answer, reply):
            raise TrainerLost(
                f"the trainer answered {name} with {type(answer).__name__}: not the same version of this program?"
            )
        return answer

    async def _post(self, member: Member, request: Any, timeout_seconds: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=10.0)
        async with self._session.post(
            f"{member.url}/v1/trainer", data=codec.encode(request), headers=self._headers, timeout=timeout
        ) as response:
            body = await response.read()
            if response.status >= 400:
                raise aiohttp.ClientResponseError(
                    response.request_info, (), status=response.status, message=body[:500].decode(errors="replace")
                )
            return codec.decode(body, TrainerReply)
