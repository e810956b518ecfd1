"""Requests to members: the coordinator's only HTTP client.

Invariant: a request ends with the member's answer, with the member's own refusal, or with a `PeerLostError` that names the member and
what it was asked for: at its time limit at the latest, and at once when the member is lost.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aiohttp

from grpo_worker.coordinator.members import Member, Members
from grpo_worker.coordinator.spans import Spans
from grpo_worker.errors import PeerLostError
from grpo_worker.protocol import codec
from grpo_worker.protocol.http import RefusedError, ask, asking
from grpo_worker.protocol.messages import GenerateEnd, GenerateRequest, GroupResult

# Seconds that an engine has, after a deadline, to say itself which prompts it did not finish.
GRACE_SECONDS = 15.0

T = TypeVar("T")


class LateError(PeerLostError):
    """The member lives and did not answer in time."""


class MemberClient:
    """Asks members, and watches them meanwhile."""

    def __init__(
        self, session: aiohttp.ClientSession, members: Members, token: str, spans: Spans | None = None
    ) -> None:
        """`spans`: gets one of each request."""
        self._session = session
        self._spans = spans or Spans()
        self._members = members
        self._token = token

    async def ask(
        self, member: Member, path: str, message: Any, kind: type[T] | Any, timeout_seconds: float, what: str
    ) -> T:
        """One message for one message. Raises RefusedError, PeerLostError."""
        url = f"{member.url}{path}"
        work = ask(self._session, url, message, kind, self._token, timeout_seconds)
        # The trainer has one path for all that it does; an engine is asked for different things in different words.
        with self._spans.of(member.name, what if member.beat.role == "trainer" else path.rpartition("/")[2]) as facts:
            reply = await self._while_it_lives(member, what, work)
            facts |= _seconds(reply)
            return reply

    async def generate(
        self, member: Member, request: GenerateRequest, on_result: Callable[[GroupResult], None]
    ) -> GenerateEnd:
        """Each prompt comes back through `on_result` as it finishes. Raises RefusedError, PeerLostError."""
        limit = request.deadline_seconds + GRACE_SECONDS

        async def stream() -> GenerateEnd:
            url = f"{member.url}/v1/generate"
            async with asking(self._session, url, request, self._token, limit + GRACE_SECONDS) as response:
                while True:
                    frame: GroupResult | GenerateEnd = await codec.read_frame(
                        response.content, GroupResult | GenerateEnd, limit
                    )
                    if isinstance(frame, GenerateEnd):
                        return frame
                    on_result(frame)

        prompts = len(request.prompts)
        with self._spans.of(member.name, "generate", prompts=prompts, version=request.min_weight_version):
            return await self._while_it_lives(member, f"generation of {prompts} prompts", stream())

    async def _while_it_lives(self, member: Member, what: str, work: Coroutine[Any, Any, T]) -> T:
        asked, watching = asyncio.create_task(work), asyncio.create_task(self._members.watch(member, what))
        try:
            await asyncio.wait({asked, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                watching.result()
            return self._result(asked, member, what)
        finally:
            asked.cancel()
            watching.cancel()
            await asyncio.gather(asked, watching, return_exceptions=True)

    def _result(self, asked: "asyncio.Task[T]", member: Member, what: str) -> T:
        try:
            return asked.result()
        except RefusedError as error:
            raise RefusedError(error.status, error.reply, f"{member.name} refused {what}: {error}") from error
        except TimeoutError as error:
            self._members.suspect(member)
            raise LateError(f"{member.name} did not finish {what} in time") from error
        except PeerLostError as error:
            self._members.suspect(member)
            raise type(error)(f"{member.name} at {member.url} was lost during {what}: {error}") from error


def _seconds(reply: Any) -> dict[str, float]:
    """The times that a member measured itself."""
    fields = {name: getattr(reply, name) for name in reply.__struct_fields__ if name.endswith("seconds")}
    metrics = getattr(reply, "metrics", {})
    return fields | {
        name.removeprefix("timing_s/"): value for name, value in metrics.items() if name.startswith("timing_s/")
    }
