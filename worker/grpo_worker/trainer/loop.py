"""The life of a rank: rank 0 takes operations from the door, all ranks run them, in step.

Invariant: rank 0 tells the others what it will do before it does it, with a tick each second when there is nothing,
so no rank waits for another without knowing that it lives. The first failure on any rank is the answer to the
operation and the exit code of the process.
"""

import logging
import os
import threading
import time

import torch.distributed as dist

from grpo_worker.errors import ExitCode, YieldedError
from grpo_worker.protocol import codec
from grpo_worker.protocol.messages import ErrorReply, StopRequest, TrainerReply, TrainerRequest
from grpo_worker.trainer.distributed import ERROR_KEY, TERMINATING_KEY, Ranks, broadcast_bytes, meet, open_store
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.failures import OperationRefused, as_error, remote_error
from grpo_worker.trainer.options import TrainerOptions
from grpo_worker.trainer.server import Operation, TrainerServer

TICK_SECONDS = 1.0
TICK, OPERATION, EXIT = b"t", b"o", b"x"
REPLY_GRACE_SECONDS = 3.0
TERMINATED_SILENCE_SECONDS = 10.0
COORDINATOR_LOST_SECONDS = 300.0  # without an answer: the process ends, to be started again

log = logging.getLogger(__name__)


def load(options: TrainerOptions, ranks: Ranks, token: str) -> TrainerEngine:
    """This rank's engine, once every rank has its own. Raises GRPOError; rank 0 learns of another rank's at once."""
    try:
        engine = TrainerEngine(options, ranks, token)
    except Exception as exception:
        if not ranks.is_first:
            _tell(ranks, remote_error(exception, "loading", ranks.rank))
        raise
    meet(ranks, options.spec.failure_policy.startup_timeout_seconds)
    return engine


def lead(engine: TrainerEngine, server: TrainerServer, options: TrainerOptions, terminated: threading.Event) -> None:
    """Rank 0, until the coordinator says stop. Raises the GRPOError that ended an operation on any rank, RetryableError
    when the coordinator is gone, YieldedError when it is gone after SIGTERM (`terminated`)."""
    ranks = engine.ranks
    while True:
        operation = server.next(TICK_SECONDS)
        if operation is None:
            end = _reason_to_end(server, options, terminated)
            if end is None:
                _share(TICK, ranks)
                continue
            _share(EXIT + codec.encode(end), ranks)
            return _end(end)
        _share(OPERATION + operation.body, ranks)
        failure = _lead_one(engine, server, operation)
        if failure is not None:
            raise as_error(failure)
        if isinstance(operation.request, StopRequest):
            return None


def follow(engine: TrainerEngine) -> None:
    """The other ranks: run what rank 0 says, until it says stop. Raises GRPOError when an operation fails here."""
    while True:
        message = _share(None, engine.ranks)
        kind, body = message[:1], message[1:]
        if kind == EXIT:
            return _end(codec.decode(body, ErrorReply))
        if kind == OPERATION:
            request: TrainerRequest = codec.decode(body, TrainerRequest)
            try:
                engine.run(request)
            except OperationRefused as refusal:
                log.warning("%s refused: %s", _name(request), refusal)
            except Exception as exception:
                error = remote_error(exception, _name(request), engine.ranks.rank)
                log.exception("%s failed", _name(request))
                _tell(engine.ranks, error)
                raise as_error(error) from exception
            if isinstance(request, StopRequest):
                return None


def _tell(ranks: Ranks, error: ErrorReply) -> None:
    ranks.store.set(ERROR_KEY, codec.encode(error))  # type: ignore[arg-type]


def watch_other_ranks(server: TrainerServer, ranks: Ranks) -> None:
    """On rank 0: a rank that failed has said so in the store. Answer with its error, and end: rank 0 may be deep
    inside a collective that will never finish, so only a thread beside it can. A rank that was told to end goes on:
    the coordinator hears of it with the next heartbeat, and saves while all ranks are there.
    """
    if ranks.world_size == 1:
        return

    def watch() -> None:
        store = open_store(ranks)
        while True:
            try:
                failed = store.check([ERROR_KEY])
                if not server.terminating and store.check([TERMINATING_KEY]):
                    server.terminating = store.get(TERMINATING_KEY).decode()
            except (RuntimeError, dist.DistError):
                return  # the store ends with the process
            if failed:
                error: ErrorReply = codec.decode(store.get(ERROR_KEY), ErrorReply)
                log.error("%s", error.message)
                server.fail_current(error)
                server.close(REPLY_GRACE_SECONDS)
                os._exit(error.exit_code)
            time.sleep(TICK_SECONDS / 2)

    threading.Thread(target=watch, name="rank-watch", daemon=True).start()


def _share(message: bytes | None, ranks: Ranks) -> bytes:
    """Rank 0's message on every rank. Raises RankLost, to be tried again, when a rank is gone: with its node, or killed."""
    try:
        return broadcast_bytes(message, ranks)
    except RuntimeError as error:  # what Gloo raises, DistError or not
        raise as_error(remote_error(error, "between two operations", ranks.rank)) from error


def tell_when_terminated(ranks: Ranks, name: str, terminated: threading.Event) -> None:
    """On the other ranks: tell rank 0 that the process `name` got SIGTERM; this one may be deep inside a collective too."""

    def tell() -> None:
        terminated.wait()
        try:
            open_store(ranks).set(TERMINATING_KEY, name)
        except (RuntimeError, dist.DistError) as error:
            log.warning("rank 0 could not be told that %s is being terminated: %s", name, error)

    threading.Thread(target=tell, name="termination", daemon=True).start()


def _lead_one(engine: TrainerEngine, server: TrainerServer, operation: Operation) -> ErrorReply | None:
    """Run and answer one operation; the error when the process has to end."""
    request, started = operation.request, time.perf_counter()
    try:
        reply: TrainerReply = engine.run(request)
    except OperationRefused as refusal:
        log.warning("%s refused: %s", _name(request), refusal)
        operation.answer(remote_error(refusal, _name(request), 0))
        return None
    except Exception as exception:
        log.exception("%s failed", _name(request))
        error = _other_ranks_error(engine.ranks) or remote_error(exception, _name(request), 0)
        operation.answer(error)
        return error
    server.metrics.record(request, reply, time.perf_counter() - started)
    operation.answer(reply)
    return None


def _other_ranks_error(ranks: Ranks) -> ErrorReply | None:
    """When rank 0 fails because another rank did, that rank's error is the one to tell."""
    if ranks.world_size == 1:
        return None
    time.sleep(TICK_SECONDS)
    try:
        return codec.decode(ranks.store.get(ERROR_KEY), ErrorReply) if ranks.store.check([ERROR_KEY]) else None
    except (RuntimeError, dist.DistError):
        return None


def _reason_to_end(server: TrainerServer, options: TrainerOptions, terminated: threading.Event) -> ErrorReply | None:
    """SIGTERM alone is no reason: the coordinator has it too, and may still want a checkpoint from us."""
    if server.told_to_stop:
        return ErrorReply(reason="Done", message="the job is over", exit_code=int(ExitCode.DONE))
    silent = server.silent_seconds
    if terminated.is_set() and (not options.coordinator_url or silent > TERMINATED_SILENCE_SECONDS):
        message = "stopped by SIGTERM; there is no coordinator that could still want a checkpoint"
        return ErrorReply(reason=YieldedError.reason, message=message, exit_code=int(ExitCode.YIELDED))
    if silent > COORDINATOR_LOST_SECONDS:
        message = f"the coordinator at {options.coordinator_url} has not answered for {silent:.0f} s"
        return ErrorReply(reason="CoordinatorLost", message=message, exit_code=int(ExitCode.RETRY))
    return None


def _end(reason: ErrorReply) -> None:
    if reason.exit_code != ExitCode.DONE:
        raise as_error(reason)


def _name(request: TrainerRequest) -> str:
    return str(request.__struct_config__.tag)
