"""Prompts to agents, samples back: the rollout node when the job names `rollout.agent`.

Invariants: a submitted group comes back once, with `n` samples or as failed; every turn is an n = 1 request to an engine in service, and a
turn that is lost is asked for again with the same tokens and seed; an episode ends within its deadline, whatever the agent does.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from weakref import WeakKeyDictionary, WeakSet

import msgspec

from grpo_worker.concurrency import Gate
from grpo_worker.coordinator import dispatch
from grpo_worker.coordinator.agents.episode import Episode, TurnRequest
from grpo_worker.coordinator.agents.load import Agent
from grpo_worker.coordinator.agents.thread import AgentRuntime, AgentThread
from grpo_worker.coordinator.blame import PERMANENT, End, convicted, end_of, gives_up, is_suspect
from grpo_worker.coordinator.dispatch import DispatchOptions, RolloutDispatcher, derived_seed, prompt_seed
from grpo_worker.coordinator.groups import Group, GroupState, Sample
from grpo_worker.coordinator.member_client import MemberClient
from grpo_worker.coordinator.members import Emit, Member, Members
from grpo_worker.coordinator.weight_sync import WeightSync
from grpo_worker.errors import PeerLostError
from grpo_worker.functions import traceback_tail
from grpo_worker.protocol.http import RefusedError, UnreachableError
from grpo_worker.protocol.messages import Array, GenerateRequest, GroupResult, PromptRequest, SampleResult

BLOCKED_SECONDS = 1.0  # a loop that was silent for so long is blocked: meanwhile nobody's deadline runs
PATIENCE_SECONDS = 5.0  # for an episode's own engine to come back into service before it moves to another


def turn_seed(base: int, uid: str, purpose: str, sample: int, turn: int) -> int:
    """Seed of one turn."""
    return derived_seed(prompt_seed(base, uid, purpose), sample, turn)


@dataclass(frozen=True)
class AgentSetup:
    """What all dispatchers of a job share."""

    name: str  # rollout.agent
    agent: Agent
    runtime: AgentRuntime
    max_model_tokens: int  # prompt and response, of the engines


class _GivenUp(Enum):
    """Why an episode was broken off."""

    FAILED = "its group has failed"
    AGAIN = "it starts again, if it has attempts left"
    NOT_COUNTED = "it starts again: another agent was to blame"
    DROPPED = "its group or the run is over"


class _AgentRaisedError(Exception):
    """The agent raised; the text is the end of its traceback."""


@dataclass(eq=False)
class _Play:
    """One episode under way."""

    group: Group
    index: int  # of the sample in its group
    attempt: int
    engine: str  # name of the replica that it stays with
    name: str
    deadline: float
    thread: AgentThread
    episode: Episode = field(init=False)
    task: "asyncio.Task[None]" = field(init=False)
    future: "Future[None] | None" = None
    requests: "set[asyncio.Task[object]]" = field(default_factory=set)
    attempts: int = 0  # of the turn under way
    misfortunes: list[str] = field(default_factory=list)
    queued: bool = False  # it waits for an engine of its own
    given_up: _GivenUp | None = None
    reason: str = ""
    sample: Sample | None = None


class AgentDispatcher(RolloutDispatcher):
    """Plays submitted groups, one episode a sample."""

    def __init__(
        self,
        client: MemberClient,
        members: Members,
        weights: WeightSync,
        emit: Emit,
        options: DispatchOptions,
        setup: AgentSetup,
        on_done: Callable[[Group], None],
    ) -> None:
        super().__init__(client, members, weights, emit, options, on_done)
        self._setup = setup
        self._plays: list[_Play] = []
        self._made: dict[int, dict[int, Sample]] = {}  # order of the group -> index -> sample
        self._lost: WeakSet[Member] = WeakSet()  # engines whose loss was told
        self._gates: WeakKeyDictionary[Member, Gate] = WeakKeyDictionary()  # a suspect has its engine alone
        self._watched = time.monotonic()

    @property
    def idle(self) -> bool:
        return not self._queue and not self._plays

    def _under_way(self) -> list["asyncio.Task[None]"]:
        for play in self._plays:
            self._give_up(play, _GivenUp.DROPPED, "the run is over")
        return [play.task for play in self._plays]

    # --- episodes

    def _launch(self) -> None:
        """Start groups while the engines have places for all of their samples."""
        n = self._options.sampling.n
        while self._queue and (serving := self._weights.in_service()):
            if self._plays and len(self._plays) + n > self._options.max_num_seqs * len(serving):
                return
            group = self._queue.popleft()
            group.state, group.attempts = GroupState.RUNNING, 1
            self._made[group.order] = {}
            engine = self._freest(serving).name  # one for the group: its samples share the prompt's cache
            for index in range(n):
                self._start(group, index, 1, engine)

    def _start(self, group: Group, index: int, attempt: int, engine: str) -> None:
        options, thread = self._options, self._setup.runtime.thread
        play = _Play(
            group,
            index,
            attempt,
            engine,
            f"{options.purpose}/{group.uid}/{index}/{attempt}",
            time.monotonic() + options.deadline_seconds,
            thread,
        )
        here = asyncio.get_running_loop()

        async def ask(request: TurnRequest) -> SampleResult:  # called in the agents' thread
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._turn(play, request), here))

        play.episode = Episode(
            group.prompt,
            thread.tokenizer,
            max_response_tokens=options.sampling.max_tokens,
            max_model_tokens=self._setup.max_model_tokens,
            ask=ask,
        )
        play.task = asyncio.create_task(self._play(play))
        self._plays.append(play)

    async def _play(self, play: _Play) -> None:
        """The episode's whole life; its outcome is in `play`."""
        if play.given_up is not None:
            return
        try:
            play.future = play.thread.start(_guarded(self._setup.agent, play.episode), play.name)
            await asyncio.wrap_future(play.future)
            if play.given_up is None:
                play.sample = play.episode.sample()
        except asyncio.CancelledError:
            if play.given_up in (None, _GivenUp.DROPPED):
                raise
        except _AgentRaisedError as error:
            self._give_up(play, _GivenUp.FAILED, f"raised:\n{error}")
        except ValueError as error:  # no sampled token
            self._give_up(play, _GivenUp.FAILED, str(error))
        finally:
            self._wake.set()

    def _land(self) -> None:
        """Collect what has ended."""
        for play in [play for play in self._plays if play.task.done()]:
            self._plays.remove(play)
            if not play.task.cancelled() and (error := play.task.exception()):
                raise error
            if play.given_up is not None:
                self._ended_without(play)
            elif play.sample is not None:
                made = self._made[play.group.order]
                made[play.index] = play.sample
                if len(made) == self._options.sampling.n:
                    self._made.pop(play.group.order)
                    play.group.samples = [made[index] for index in sorted(made)]
                    play.group.state = GroupState.SCORING
                    self._on_done(play.group)

    def _ended_without(self, play: _Play) -> None:
        group, counted = play.group, play.given_up is _GivenUp.AGAIN
        if play.given_up is _GivenUp.DROPPED or group.state is GroupState.FAILED:
            return
        group.failure = f"rollout.agent: {self._setup.name!r}, sample {play.index}: {play.reason}"
        if play.given_up is _GivenUp.FAILED or (counted and play.attempt >= self._options.max_attempts):
            group.state = GroupState.FAILED
            self._made.pop(group.order)
            for sibling in self._plays:
                if sibling.group is group:
                    self._give_up(sibling, _GivenUp.DROPPED, "another sample of its group failed")
            self._emit(
                "error", "PromptFailed", f"prompt {group.uid} failed after {play.attempt} attempts: {group.failure}"
            )
            self._on_done(group)
            return
        if counted:
            self._emit("warning", "EpisodeLost", f"prompt {group.uid} starts again: {group.failure}")
        attempt = play.attempt + counted
        group.attempts = max(group.attempts, attempt)
        self.redispatched += 1
        self._start(group, play.index, attempt, play.engine)

    def _give_up(self, play: _Play, why: _GivenUp, reason: str) -> None:
        """End an episode, whether its agent wants to or not. The first reason counts."""
        play.episode.close()
        if play.given_up is None:
            play.given_up, play.reason = why, reason
        if play.future is not None:
            play.future.cancel()
        for request in play.requests - {asyncio.current_task()}:
            request.cancel()

    def _watch(self) -> None:
        """Now and then: give up what is over its deadline; leave a blocked thread behind. Deadlines stand still while nobody can be
        served. Raises PeerLostError."""
        now = time.monotonic()
        if now - self._watched < dispatch.WATCH_SECONDS / 2:
            return
        elapsed, self._watched = now - self._watched, now
        self._service.check(len(self._queue) + len({play.group.order for play in self._plays}))
        limit, runtime = self._options.deadline_seconds, self._setup.runtime
        silent = runtime.thread.silent_seconds
        if silent > max(limit, BLOCKED_SECONDS):
            runtime.replace()
        waits = silent > BLOCKED_SECONDS or not self._weights.in_service()
        names = {play.name for play in self._plays}
        for play in self._plays:
            if play.given_up is not None:
                continue
            if play.thread.abandoned:
                blocker = play.thread.blocker
                self._blocked(play, known=blocker is not None and blocker.name in names, limit=limit)
            elif waits or play.queued:
                play.deadline += elapsed
            elif now > play.deadline:
                self._give_up(play, _GivenUp.AGAIN, f"did not end within {limit:g} s (rollout.requestTimeoutSeconds)")

    def _blocked(self, play: _Play, *, known: bool, limit: float) -> None:
        """An episode of a thread that was left behind."""
        blocker = play.thread.blocker
        if blocker is not None and play.name == blocker.name:
            reason = f"blocked the agents' event loop for over {limit:g} s (rollout.requestTimeoutSeconds)."
            advice = "Await what takes long, or run it with asyncio.to_thread. It was here:"
            self._give_up(play, _GivenUp.FAILED, f"{reason} {advice}\n{blocker.stack}")
        else:
            why = _GivenUp.NOT_COUNTED if known else _GivenUp.AGAIN
            self._give_up(play, why, "the agents' event loop was blocked")

    # --- turns

    async def _turn(self, play: _Play, request: TurnRequest) -> SampleResult:
        """One continuation, from any engine. Runs in the coordinator's loop."""
        task = asyncio.current_task()
        assert task is not None
        play.requests.add(task)
        play.attempts, reason = 0, play.reason
        try:
            while play.given_up is None:
                member = await self._engine(play)
                gate, alone = self._gates.setdefault(member, Gate()), is_suspect(play)
                play.queued = True
                async with gate.exclusive() if alone else gate.shared():
                    play.queued = False
                    answer = await self._ask(play, member, request)
                if isinstance(answer, SampleResult):
                    play.misfortunes.clear()
                    return answer
                reason, end = answer
                if gives_up(play, end, member.name, alone=alone, max_attempts=self._options.max_attempts):
                    reason += convicted(play)
                    break
                self.redispatched += 1
            self._give_up(play, _GivenUp.FAILED, reason)
            raise PeerLostError(reason)
        finally:
            play.queued = False
            play.requests.discard(task)

    async def _ask(self, play: _Play, member: Member, turn: TurnRequest) -> SampleResult | tuple[str, End]:
        """The engine's answer, or why there is none."""
        results: list[GroupResult] = []
        reason, end = f"{member.name} ended its reply early", End.UNFINISHED
        try:
            ended = await self._client.generate(member, self._request(play, turn), results.append)
            self.generated_tokens += ended.generated_tokens
        except PeerLostError as error:
            reason, end = str(error), end_of(error, member)
            if isinstance(error, (RefusedError, UnreachableError)):
                self._weights.doubt(member)
        result = next((result for result in results if result.id == play.group.uid), None)
        if result is not None:
            if result.error is None and result.samples[0].finish_reason != "abort":
                return result.samples[0]
            reason = f"{member.name}: {result.error or 'aborted the request'}"
            if result.error_kind in PERMANENT:
                self._give_up(play, _GivenUp.FAILED, reason)
            elif result.error_kind == "deadline":
                self._give_up(play, _GivenUp.AGAIN, reason)
            elif result.error_kind == "engine_dead":
                end = End.ENGINE_DIED
                self._members.suspect(member)
            elif result.error_kind:
                end = End.FAILED
        if end in (End.ENGINE_DIED, End.LOST, End.NO_FAULT) and member not in self._lost:
            self._lost.add(member)
            self._emit("warning", "RolloutLost", f"{reason}; its turns are asked for again")
        return reason, end

    def _request(self, play: _Play, turn: TurnRequest) -> GenerateRequest:
        options, uid = self._options, play.group.uid
        seed = options.seed
        self._requests += 1
        sampling = msgspec.structs.replace(
            options.sampling,
            n=1,
            max_tokens=turn.max_tokens,
            stop_token_ids=sorted({*options.sampling.stop_token_ids, *turn.stop_token_ids}),
        )
        prompt = PromptRequest(
            id=uid,
            token_ids=Array.of(turn.token_ids, "int32"),
            seed=None if seed is None else turn_seed(seed, uid, options.purpose, play.index, turn.turn),
        )
        return GenerateRequest(
            request_id=f"{options.purpose}-{self._requests}",
            prompts=[prompt],
            sampling=sampling,
            deadline_seconds=max(play.deadline - time.monotonic(), dispatch.WATCH_SECONDS),
            min_weight_version=self._weights.version,
        )

    async def _engine(self, play: _Play) -> Member:
        """The episode's own replica while it serves, so that its cache has the conversation; else the freest."""
        patience = time.monotonic() + PATIENCE_SECONDS
        while True:
            serving = self._weights.in_service()
            own = next((member for member in serving if member.name == play.engine), None)
            if own is not None:
                return own
            alive = any(member.name == play.engine for member in self._members.alive("rollout"))
            if serving and not (alive and time.monotonic() < patience):
                moved = self._freest(serving)
                play.engine = moved.name
                return moved
            await self._members.wait(dispatch.WATCH_SECONDS)

    def _freest(self, serving: Sequence[Member]) -> Member:
        held = [play.engine for play in self._plays]
        return min(serving, key=lambda member: held.count(member.name))


async def _guarded(agent: Agent, episode: Episode) -> None:
    """The agent's call. It may raise anything, which must not end the thread."""
    try:
        await agent(episode)
    except asyncio.CancelledError:
        if episode.closed:
            raise
        raise _AgentRaisedError("asyncio.CancelledError: the agent cancelled itself") from None
    except GeneratorExit:  # nobody will ever resume it
        raise
    except BaseException as error:
        raise _AgentRaisedError(traceback_tail(error)) from None
    finally:
        episode.close()
