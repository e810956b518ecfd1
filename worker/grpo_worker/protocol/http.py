"""Both ends of a request between the roles: who may ask, what an answer looks like, and what a failed one means.

Invariants:
- A request without the job's token is answered 401 before its body is read. Probes and metrics are open (the kubelet and Prometheus
  ask them).
- Every answer of every port with a status of 400 and above is an `ErrorReply`, as JSON: people read it too. Nothing else is an error,
  and what a handler raises as `RefusedError` is what the caller gets.
"""

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from grpo_worker.errors import ExitCode, GRPOError, PeerLostError
from grpo_worker.protocol import codec
from grpo_worker.protocol.auth import allowed, authorization
from grpo_worker.protocol.messages import ErrorReply

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
CONNECT_TIMEOUT_SECONDS = 10.0
UNAUTHORIZED = ErrorReply(
    reason="Unauthorized",
    message="the job's token is missing or wrong. All processes of a job must run with the same GRPO_JOB_TOKEN.",
    exit_code=int(ExitCode.CONFIG),
)
TEXT_CHARACTERS = 500  # of an answer that is not ours

log = logging.getLogger(__name__)

T = TypeVar("T")


class RefusedError(PeerLostError):
    """The server answered, and said no."""

    def __init__(self, status: int, reply: ErrorReply, message: str = "") -> None:
        super().__init__(message or reply.message)
        self.status, self.reply = status, reply


class UnreachableError(PeerLostError):
    """No connection came about: the server has not seen the request."""


def refused(status: int, reason: str, message: str) -> RefusedError:
    """What a handler raises."""
    return RefusedError(status, ErrorReply(reason=reason, message=message))


# --- the server's end


def answer(message: Any) -> web.Response:
    """A message as a whole answer."""
    return web.Response(body=codec.encode(message), content_type=codec.CONTENT_TYPE)


def error_answer(status: int, reply: ErrorReply) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(reply), content_type="application/json")


async def read(request: web.Request, kind: type[T] | Any, what: str) -> T:
    """The request's message. Raises RefusedError that names the field at fault."""
    try:
        return codec.decode(await request.read(), kind)
    except msgspec.DecodeError as error:
        raise refused(400, "InvalidRequest", f"the body is not {what}: {error}") from error


def door(
    token: str,
    statuses: Mapping[type[GRPOError], int] | None = None,
    on_error: Callable[[str], None] = lambda reason: None,
) -> Middleware:
    """The one middleware of every server; it keeps both invariants.

    Args:
        statuses: of the errors that handlers raise; others are 502.
        on_error: is told the reason of each error.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.path not in OPEN_PATHS and not allowed(request.headers.get("Authorization", ""), token):
                raise RefusedError(401, UNAUTHORIZED)
            return await handler(request)
        except Exception as error:
            if request.writer.output_size:
                raise  # the answer has begun: it is cut off
            status, reply = _reply_of(error, statuses or {})
            if status == 500:
                log.exception("%s %s failed", request.method, request.path)
        on_error(reply.reason)
        return error_answer(status, reply)

    return check


def _reply_of(error: Exception, statuses: Mapping[type[GRPOError], int]) -> tuple[int, ErrorReply]:
    if isinstance(error, RefusedError):
        return error.status, error.reply
    if isinstance(error, GRPOError):
        status = next((code for kind, code in statuses.items() if isinstance(error, kind)), 502)
        return status, ErrorReply(reason=error.reason, message=str(error), exit_code=int(error.exit_code))
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return 413, ErrorReply(reason="RequestTooLarge", message=error.text or error.reason)
    if isinstance(error, web.HTTPException):
        return error.status, ErrorReply(reason=error.reason.replace(" ", ""), message=error.reason)
    return 500, ErrorReply(reason="InternalError", message=f"{type(error).__name__}: {error}")


# --- the client's end


@asynccontextmanager
async def asking(
    session: aiohttp.ClientSession, url: str, message: Any, token: str, timeout_seconds: float
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Post a message; the block reads the answer.

    Raises RefusedError (the server's own words), UnreachableError, TimeoutError after the limit, and PeerLostError when there is no
    answer, it ends early or cannot be read.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_TIMEOUT_SECONDS)
    headers = {**authorization(token), "Content-Type": codec.CONTENT_TYPE}
    try:
        async with session.post(url, data=codec.encode(message), headers=headers, timeout=timeout) as response:
            if response.status >= 400:
                body = await response.read()
                raise RefusedError(response.status, _error_of(body, response.status))
            yield response
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise UnreachableError(str(error) or type(error).__name__) from error
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
            raise
        raise PeerLostError(str(error) or type(error).__name__) from error
    except msgspec.MsgspecError as error:
        raise PeerLostError(f"its answer cannot be read ({error}): not the same version of this program?") from error


async def ask(
    session: aiohttp.ClientSession, url: str, message: Any, kind: type[T] | Any, token: str, timeout_seconds: float
) -> T:
    """Post a message and read the whole answer. Raises as `asking`."""
    async with asking(session, url, message, token, timeout_seconds) as response:
        return codec.decode(await response.read(), kind)


def _error_of(body: bytes, status: int) -> ErrorReply:
    try:
        return msgspec.json.decode(body, type=ErrorReply)
    except msgspec.DecodeError:
        text = body[:TEXT_CHARACTERS].decode(errors="replace").strip()
        return ErrorReply(reason="NotOurs", message=f"status {status}{f': {text}' if text else ''}")
