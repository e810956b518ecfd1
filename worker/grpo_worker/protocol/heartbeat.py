"""How a worker stays a member: it tells the coordinator that it lives, and learns what is expected of it.

Invariant: a coordinator that does not answer is never an error here (it may be restarting); how long it has been
silent is known at any time, and the worker decides what that means.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import aiohttp

from grpo_worker.errors import PeerLostError
from grpo_worker.protocol.http import ask
from grpo_worker.protocol.messages import Heartbeat, HeartbeatReply

MEMBERS_PATH = "/v1/members"
REQUEST_TIMEOUT_SECONDS = 10.0

log = logging.getLogger(__name__)


class HeartbeatClient:
    """Posts `beat()` every `interval_seconds`, and at once after `wake`. Belongs to the event loop that runs `run`."""

    def __init__(
        self,
        coordinator_url: str,
        token: str,
        interval_seconds: float,
        beat: Callable[[], Heartbeat],
        on_reply: Callable[[HeartbeatReply], None] | None = None,
    ) -> None:
        self.url = coordinator_url.rstrip("/") + MEMBERS_PATH
        self.reply: HeartbeatReply | None = None
        self._token = token
        self._interval_seconds = interval_seconds
        self._beat = beat
        self._on_reply = on_reply
        self._wake = asyncio.Event()
        self._answered = time.monotonic()
        self._told_at = 0.0  # silent for so long when it was last logged

    @property
    def silent_seconds(self) -> float:
        """Time since the coordinator's last answer (since the start, before the first)."""
        return time.monotonic() - self._answered

    def wake(self) -> None:
        """Beat now: the state has changed. Call from the event loop's thread."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with aiohttp.ClientSession() as session:
            while True:
                self._wake.clear()
                await self._post(session, REQUEST_TIMEOUT_SECONDS)
                try:
                    await asyncio.wait_for(self._wake.wait(), self._interval_seconds)
                except TimeoutError:
                    continue

    async def say(self, timeout_seconds: float) -> None:
        """One more beat, after `run` was cancelled: the last word of a worker that leaves. Nobody may hear it."""
        async with aiohttp.ClientSession() as session:
            await self._post(session, timeout_seconds)

    async def _post(self, session: aiohttp.ClientSession, timeout_seconds: float) -> None:
        try:
            reply: HeartbeatReply = await ask(
                session, self.url, self._beat(), HeartbeatReply, self._token, timeout_seconds
            )
        except (PeerLostError, TimeoutError) as error:
            silent = self.silent_seconds
            if not self._told_at or silent > 2 * self._told_at:  # ever more rarely
                self._told_at = max(silent, 1.0)
                cause = str(error) or type(error).__name__
                log.warning("heartbeat to %s failed: %s (silent for %.0f s)", self.url, cause, silent)
            return
        self.reply, self._answered, self._told_at = reply, time.monotonic(), 0.0
        if self._on_reply is not None:
            self._on_reply(reply)
