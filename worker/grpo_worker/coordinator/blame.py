"""What a prompt answers for when a request does not bring it back.

Invariant: a prompt answers for what it did itself, and for nothing else. An engine that refuses it, or that fails or runs out of time with
it alone, costs one of its attempts. What happened to it in company says little of it; after `SUSPECT_AFTER` such misfortunes it is a
suspect, to be tried last and alone. So a prompt that kills engines is found, costs a bounded number of them, and no other prompt is
lost with it. An engine that was told to end, fell silent, or may not serve says nothing at all.
"""

from enum import Enum
from typing import Protocol

from grpo_worker.coordinator.member_client import LateError
from grpo_worker.coordinator.members import Member, SilentError
from grpo_worker.errors import PeerLostError
from grpo_worker.protocol.http import RefusedError, UnreachableError

PERMANENT = frozenset({"prompt_too_long", "token_out_of_range"})  # kinds of errors that no engine and no time mends
SUSPECT_AFTER = 2  # misfortunes in company
STATES_OF_AN_ENGINE = (409, 502, 503, 504)  # of refusals that have nothing to do with what was asked for


class End(Enum):
    """Why a request did not bring a prompt back."""

    FAILED = "the engine could not generate it"
    ENGINE_DIED = "its engine died"  # told by the server that lost it
    LOST = "the connection was cut, and the process is gone as far as one can see"
    UNFINISHED = "not finished in time, or broken off, by an engine that lives"
    NO_FAULT = "the engine was told to end, fell silent, or may not serve now"


def end_of(error: PeerLostError, member: Member) -> End:
    """Of the prompts of a request that ended with `error`."""
    if isinstance(error, LateError):
        return End.UNFINISHED
    if isinstance(error, RefusedError):
        return End.NO_FAULT if error.status in STATES_OF_AN_ENGINE else End.UNFINISHED
    if isinstance(error, (SilentError, UnreachableError)) or member.beat.terminating:
        return End.NO_FAULT
    return End.LOST


class Tried(Protocol):
    """A prompt, or an episode's turn, on its way through engines."""

    attempts: int
    misfortunes: list[str]


def gives_up(tried: Tried, end: End, engine: str, *, alone: bool, max_attempts: int) -> bool:
    """Count an end; True when it was the last. A death of an engine that had nothing else has to happen twice before it counts for
    good, unless the server itself says that its engine died at work: a preempted machine looks the same otherwise."""
    if end is End.NO_FAULT:
        return False
    if end is End.FAILED or (alone and end is End.UNFINISHED):
        tried.attempts += 1
        return tried.attempts >= max_attempts
    tried.misfortunes.append(engine)
    return alone and len(tried.misfortunes) > SUSPECT_AFTER + (end is End.LOST)


def is_suspect(tried: Tried) -> bool:
    return len(tried.misfortunes) >= SUSPECT_AFTER


def convicted(tried: Tried) -> str:
    """What is added to the reason of one that was given up for its engines' deaths; else ''."""
    if len(tried.misfortunes) <= SUSPECT_AFTER:
        return ""
    return (
        f". Engines died {len(tried.misfortunes)} times while they had this prompt ({', '.join(tried.misfortunes)}), at last while they had "
        "nothing else: look at the prompt, and at the rollout logs"
    )
