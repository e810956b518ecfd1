"""One generation request to one engine.

Invariant: each prompt of a request comes back exactly once through `on_result`, or the call raises; a stream that is cut, silent
past its deadline or malformed is a `PeerLostError` that names the engine.
"""

from collections.abc import Callable

import aiohttp
import msgspec

from grpo_worker.coordinator.members import Member
from grpo_worker.errors import PeerLostError
from grpo_worker.protocol import codec
from grpo_worker.protocol.auth import authorization
from grpo_worker.protocol.messages import ErrorReply, GenerateEnd, GenerateRequest, GroupResult

# Seconds that an engine has, after a deadline, to say itself which prompts it did not finish.
GRACE_SECONDS = 15.0


class EngineClient:
    """HTTP client of the rollout servers."""

    def __init__(self, session: aiohttp.ClientSession, token: str) -> None:
        self._session = session
        self._headers = {**authorization(token), "Content-Type": codec.CONTENT_TYPE}

    async def generate(
        self, member: Member, request: GenerateRequest, on_result: Callable[[GroupResult], None]
    ) -> GenerateEnd:
        """Raises PeerLostError."""
        limit = request.deadline_seconds + GRACE_SECONDS
        timeout = aiohttp.ClientTimeout(total=limit + GRACE_SECONDS, sock_connect=10.0)
        url = f"{member.url}/v1/generate"
        try:
            async with self._session.post(
                url, data=codec.encode(request), headers=self._headers, timeout=timeout
            ) as response:
                if response.status >= 400:
                    raise PeerLostError(
                        f"{member.name} refused a request: {_refusal(await response.read(), response.status)}"
                    )
                while True:
                    frame: GroupResult | GenerateEnd = await codec.read_frame(
                        response.content, GroupResult | GenerateEnd, limit
                    )
                    if isinstance(frame, GenerateEnd):
                        return frame
                    on_result(frame)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise PeerLostError(f"{member.name} at {member.url} was lost: {error or type(error).__name__}") from error


def _refusal(body: bytes, status: int) -> str:
    try:
        return codec.decode(body, ErrorReply).message
    except msgspec.DecodeError:
        return f"status {status}"
