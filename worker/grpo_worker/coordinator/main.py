"""The coordinator process: builds the parts from the document, runs the loop, and ends with a word that a supervisor understands.

Invariant: everything that can be checked without a GPU (data, tokenizer, reward function, checkpoint directory) is checked before the
trainer is asked for anything.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from grpo_worker.algorithms import ESTIMATORS, make_kl_controller
from grpo_worker.concurrency import first_to_end
from grpo_worker.config import GRPOJob, resolved_document
from grpo_worker.config.actor import check_decay
from grpo_worker.coordinator.agents.dispatcher import AgentDispatcher, AgentSetup
from grpo_worker.coordinator.agents.load import Agent, load_agent
from grpo_worker.coordinator.agents.thread import AgentRuntime
from grpo_worker.coordinator.app import make_app, serve
from grpo_worker.coordinator.dispatch import Dispatcher, DispatchOptions, RolloutDispatcher
from grpo_worker.coordinator.engine_client import EngineClient
from grpo_worker.coordinator.groups import Group
from grpo_worker.coordinator.loop import Parts, TrainingLoop
from grpo_worker.coordinator.members import Members
from grpo_worker.coordinator.progress import Progress
from grpo_worker.coordinator.prompts import open_training_data, open_validation_prompts
from grpo_worker.coordinator.records import StepRecords
from grpo_worker.coordinator.saver import Saver
from grpo_worker.coordinator.schedule import Schedule
from grpo_worker.coordinator.scoring import Scorer
from grpo_worker.coordinator.trainer_client import TrainerClient
from grpo_worker.coordinator.validation import Validation
from grpo_worker.coordinator.weight_sync import WeightSync
from grpo_worker.data.order import Cursor
from grpo_worker.data.tokenizer import TokenizerInfo, load_tokenizer
from grpo_worker.environment import COORDINATOR_PORT, LISTEN_HOST, RESUME
from grpo_worker.errors import GRPOError, YieldedError
from grpo_worker.functions import load_function
from grpo_worker.metric_loggers import EventLog, open_loggers
from grpo_worker.model_files import parameter_count
from grpo_worker.protocol.auth import job_token
from grpo_worker.protocol.messages import Heartbeat, HeartbeatReply, Sampling
from grpo_worker.rewards.pool import RewardPool
from grpo_worker.run_directory import RunDirectory

# float32 master weights and two moments, and a copy of at most float32 in `actor/`.
CHECKPOINT_BYTES_PER_PARAMETER = 16


def run(job: GRPOJob) -> dict[str, object]:
    """Run the coordinator to its end; what its last word tells. Raises GRPOError."""
    return asyncio.run(Coordinator(job).run())


class Coordinator:
    """One life of the coordinator. `incarnation` tells its versions from those of an earlier life."""

    def __init__(self, job: GRPOJob) -> None:
        self._job = job
        self._spec = job.spec
        self._token = job_token()
        self._directory = RunDirectory.of_environment(job.name)
        self._events = EventLog(self._directory.events, "coordinator")
        self._members = Members(job.spec.network.member_timeout_seconds, time.monotonic)
        self._incarnation = secrets.token_hex(4)
        self._loop: TrainingLoop | None = None
        self._startup: asyncio.Task[Any] | None = None
        self._stop_reason = ""
        self._stopping = False
        self._told: set[str] = set()

    async def run(self) -> dict[str, object]:
        """Returns how far the run got (`Progress.last_word`). Raises GRPOError, with the same as its context."""
        network = self._spec.network
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20) as session:
            self._session = session
            self._trainer = TrainerClient(session, self._members, self._token, network.request_timeout_seconds)
            self._weights = WeightSync(
                session,
                self._members,
                self._trainer,
                self._token,
                network.weight_sync_timeout_seconds,
                self._events.emit,
            )
            self._progress = Progress(
                self._job.name, self._incarnation, self._members, self._weights, self._spec.trainer.total_epochs
            )
            app = make_app(self._token, self._members, self._progress, self._reply, self._stop)
            port = int(os.environ.get(COORDINATOR_PORT) or network.coordinator_port)
            server = await serve(app, os.environ.get(LISTEN_HOST, "127.0.0.1"), port)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._stop, number.name)
            try:
                await self._train()
                await self._say_farewell()
                return self._progress.last_word()
            except GRPOError as error:
                yielded = isinstance(error, YieldedError)
                if not yielded:
                    self._progress.set("Failed", str(error))
                self._events.emit("info" if yielded else "error", error.reason, str(error))
                if yielded:
                    await self._say_farewell()
                error.context = self._progress.last_word()
                raise
            finally:
                await server.cleanup()

    async def _train(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            self._startup = asyncio.create_task(self._build(stack))
            try:
                self._loop = loop = await self._startup
            except asyncio.CancelledError:
                if self._stop_reason:
                    raise YieldedError(f"stopped before the first step ({self._stop_reason})") from None
                raise
            if self._stop_reason:
                loop.stop(self._stop_reason)
            await first_to_end(loop.run(), loop.dispatcher.run(), self._weights.join_forever())

    async def _build(self, stack: contextlib.AsyncExitStack) -> TrainingLoop:
        """All parts of the loop, cheap checks first."""
        spec, events, progress = self._spec, self._events, self._progress
        saver = Saver(
            self._directory.checkpoints(spec.checkpoint.path),
            spec.checkpoint.keep_last,
            self._trainer,
            events.emit,
            progress.saved,
            progress.kept,
        )
        saver.prepare((parameter_count(spec.model.path) or 0) * CHECKPOINT_BYTES_PER_PARAMETER)
        name = spec.algorithm.advantage_estimator
        estimator = ESTIMATORS[name] if name in ESTIMATORS else load_function(name, "algorithm.advantageEstimator")
        rollout = spec.rollout
        agent = load_agent(rollout.agent, rollout.agent_options) if rollout.agent else None
        progress.set("Starting", "reading the data")
        tokenizer = await asyncio.to_thread(load_tokenizer, spec.model.path, spec.model.revision)
        for note in tokenizer.notes:
            events.emit("warning", "Tokenizer", note)
        data = await asyncio.to_thread(open_training_data, spec, tokenizer.tokenizer)
        report = data.scan()
        events.emit(
            "info",
            "DataLoaded",
            f"Data: {report.kept} prompts, {report.dropped_overlong} over data.maxPromptLength left out",
        )
        total = _total_steps(
            spec.trainer.total_steps, report.kept * spec.trainer.total_epochs // spec.data.train_batch_size
        )
        optim, updates_per_step = spec.actor.optim, spec.actor.updates_per_step(spec.data.train_batch_size)
        check_decay(optim.lr_scheduler, optim.lr_warmup_steps, total * updates_per_step)
        validation_prompts = await asyncio.to_thread(open_validation_prompts, spec, tokenizer.tokenizer)
        pool = RewardPool(
            spec.reward.function,
            dict(spec.reward.options),
            spec.reward.workers,
            spec.reward.timeout_seconds,
            spec.failure_policy.startup_timeout_seconds,
        )
        await stack.enter_async_context(pool)
        scorer = Scorer(
            pool,
            tokenizer.tokenizer,
            minimum_samples=min(2, spec.rollout.n),
            filter_metric=spec.algorithm.filter_groups.metric if spec.algorithm.filter_groups.enable else None,
            max_failure_ratio=spec.reward.max_failure_ratio,
        )
        stack.push_async_callback(scorer.close)

        progress.set("Starting", "waiting for the trainer")
        await self._trainer.connect(spec.failure_policy.startup_timeout_seconds)
        resumed = await saver.resume(os.environ.get(RESUME) or spec.checkpoint.resume)
        kl_controller = make_kl_controller(
            spec.algorithm.kl_ctrl.type,
            spec.algorithm.kl_ctrl.kl_coef,
            horizon=spec.algorithm.kl_ctrl.horizon,
            target_kl=spec.algorithm.kl_ctrl.target_kl,
        )
        step, cursor = 0, Cursor()
        if resumed is not None:
            point, state = resumed
            step, cursor = point.step, data.restore(state["data"])
            kl_controller.load_state_dict(state["kl_controller"])
            if saver.last is not None:
                progress.saved(saver.last)
            events.emit("info", "Resumed", f"Resuming from {point.path.name} at step {step}")
        keep = step if step > 0 else -1
        loggers = open_loggers(
            spec.trainer.loggers,
            self._directory.root,
            spec.trainer.project_name,
            spec.trainer.experiment_name or self._job.name,
            resolved_document(self._job),
            keep,
            total_steps=total,
            events=events,
        )
        stack.callback(loggers.close)
        ledger, samples = StepRecords(self._directory.ledger, keep), StepRecords(self._directory.samples, keep)
        stack.callback(ledger.close)
        stack.callback(samples.close)
        progress.set("Starting", "waiting for the rollout servers")
        options = self._dispatch_options(tokenizer)
        schedule = Schedule(
            data.iterate(cursor),
            cursor,
            batch_size=spec.data.train_batch_size,
            max_staleness=spec.rollout.max_staleness,
            max_gen_batches=spec.algorithm.filter_groups.max_num_gen_batches
            if spec.algorithm.filter_groups.enable
            else 1,
            version=step,
            last_version=total,
        )
        sampling = spec.rollout.validation
        validation = Validation(
            validation_prompts,
            options,
            sampling.n,
            sampling.temperature,
            sampling.top_p,
            atomic=spec.rollout.max_staleness == 0,
        )
        parts = Parts(
            dataset=data,
            schedule=schedule,
            make_dispatcher=self._dispatchers(await self._agent_setup(agent, tokenizer, stack)),
            dispatch_options=options,
            scorer=scorer,
            estimator=estimator,
            kl_controller=kl_controller,
            trainer=self._trainer,
            weights=self._weights,
            saver=saver,
            validation=validation if validation_prompts else None,
            loggers=loggers,
            ledger=ledger,
            samples=samples,
            progress=progress,
            emit=events.emit,
        )
        return TrainingLoop(spec, parts, step, total)

    async def _agent_setup(
        self, agent: Agent | None, tokenizer: TokenizerInfo, stack: contextlib.AsyncExitStack
    ) -> AgentSetup | None:
        """What rollouts by `rollout.agent` need; None without one."""
        rollout, data = self._spec.rollout, self._spec.data
        if agent is None or rollout.agent is None:
            return None
        runtime = await asyncio.to_thread(AgentRuntime, tokenizer.tokenizer)
        stack.callback(runtime.close)
        limit = rollout.context_tokens(data.max_prompt_length, data.max_response_length)
        return AgentSetup(rollout.agent, agent, runtime, limit)

    def _dispatchers(
        self, setup: AgentSetup | None
    ) -> Callable[[DispatchOptions, Callable[[Group], None]], RolloutDispatcher]:
        """How dispatchers are made: for single turns, or for agents."""
        engines, members, weights, emit = (
            EngineClient(self._session, self._token), self._members, self._weights, self._events.emit
        )  # fmt: skip

        def make(options: DispatchOptions, on_done: Callable[[Group], None]) -> RolloutDispatcher:
            if setup is None:
                return Dispatcher(engines, members, weights, emit, options, on_done)
            return AgentDispatcher(engines, members, weights, emit, options, setup, on_done)

        return make

    def _dispatch_options(self, tokenizer: TokenizerInfo) -> DispatchOptions:
        rollout = self._spec.rollout
        return DispatchOptions(
            sampling=Sampling(
                n=rollout.n,
                max_tokens=self._spec.data.max_response_length,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                stop_token_ids=list(tokenizer.eos_ids),
            ),
            purpose="train",
            seed=rollout.seed if rollout.seed_per_request else None,
            deadline_seconds=rollout.request_timeout_seconds,
            max_attempts=rollout.max_attempts,
            max_num_seqs=rollout.max_num_seqs,
            no_engine_timeout_seconds=self._spec.failure_policy.startup_timeout_seconds,
        )

    def _reply(self, beat: Heartbeat) -> HeartbeatReply:
        if self._stopping:
            self._told.add(beat.name)
        elif (
            beat.terminating and beat.role == "trainer" and not self._stop_reason
        ):  # an eviction: what it holds is saved while it still lives
            self._stop(f"{beat.terminating} is being terminated")
        return HeartbeatReply(
            incarnation=self._incarnation,
            policy_version=self._weights.version,
            max_staleness=self._spec.rollout.max_staleness,
            stop=self._stopping,
        )

    def _stop(self, reason: str) -> None:
        """A signal or a request: end after the step under way; a start is broken off."""
        self._stop_reason = self._stop_reason or reason
        if self._loop is not None:
            self._loop.stop(reason)
        elif self._startup is not None:
            self._startup.cancel()

    async def _say_farewell(self) -> None:
        """Tell every living process, with the answer to its next heartbeat, that the run is over."""
        self._stopping = True
        if stopped := await self._trainer.stop():
            self._told.add(stopped)
        limit = time.monotonic() + 3 * self._spec.network.heartbeat_seconds + 1.0
        while time.monotonic() < limit:
            if all(member.name in self._told for member in self._members.present()):
                return
            await asyncio.sleep(0.05)


def _total_steps(asked: int | None, in_data: int) -> int:
    return in_data if asked is None else min(asked, in_data)
