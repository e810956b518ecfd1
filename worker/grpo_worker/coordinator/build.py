"""From the document to the parts of the training loop.

Invariant: everything that can be checked without a GPU (disk, functions, data, tokenizer) is checked before the trainer is asked for
anything; what was opened is closed when the caller's stack unwinds.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_worker.algorithms import ESTIMATORS, AdvantageEstimator
from grpo_worker.concurrency import in_daemon_thread
from grpo_worker.config import GRPOJob, Spec, written_document
from grpo_worker.config.actor import check_decay
from grpo_worker.coordinator.agents.dispatcher import AgentDispatcher, AgentSetup
from grpo_worker.coordinator.agents.load import load_agent
from grpo_worker.coordinator.agents.thread import AgentRuntime
from grpo_worker.coordinator.collector import Collector
from grpo_worker.coordinator.dispatch import Dispatcher, DispatchOptions, RolloutDispatcher
from grpo_worker.coordinator.halt import Halt
from grpo_worker.coordinator.learner import Learner
from grpo_worker.coordinator.loop import Parts, TrainingLoop
from grpo_worker.coordinator.member_client import MemberClient
from grpo_worker.coordinator.members import Members
from grpo_worker.coordinator.otlp import SpanExporter
from grpo_worker.coordinator.progress import Progress
from grpo_worker.coordinator.prompts import open_tokenizer, open_training_data, open_validation_prompts
from grpo_worker.coordinator.rollout_dump import RolloutDump
from grpo_worker.coordinator.run_log import RunLog
from grpo_worker.coordinator.run_state import check_same_model, describe_model
from grpo_worker.coordinator.saver import Saver
from grpo_worker.coordinator.schedule import Schedule
from grpo_worker.coordinator.scoring import Scorer
from grpo_worker.coordinator.spans import SPANS_BYTES, Spans
from grpo_worker.coordinator.timing import StartupTimer
from grpo_worker.coordinator.trainer_client import TrainerClient
from grpo_worker.coordinator.validation import MakeDispatcher, OnDone, Validation
from grpo_worker.coordinator.weight_sync import WeightSync
from grpo_worker.data.dataset import Prompt, PromptDataset, ScanReport
from grpo_worker.data.order import Cursor
from grpo_worker.data.tokenizer import TokenizerInfo, stop_token_ids
from grpo_worker.environment import RESUME
from grpo_worker.functions import load_function
from grpo_worker.metric_loggers import EventLog, StepFile, open_loggers, set_aside
from grpo_worker.model_files import parameter_count, resolve_model
from grpo_worker.protocol.messages import Sampling
from grpo_worker.rewards.lookup import PARTS
from grpo_worker.rewards.parts import as_options
from grpo_worker.rewards.pool import RewardPool, memory_share
from grpo_worker.run_directory import RunDirectory

# Prompts whose samples say how far engine and trainer are apart, where nothing else reads the engine's log-probs.
MISMATCH_ONE_IN = 8
# float32 master weights and two moments, and a copy of at most float32 in `actor/`.
CHECKPOINT_BYTES_PER_PARAMETER = 16


@dataclass
class Outside:
    """What the loop finds around it: the other processes of the job, and where the run is told of."""

    client: MemberClient
    members: Members
    trainer: TrainerClient
    weights: WeightSync
    directory: RunDirectory
    events: EventLog
    progress: Progress
    spans: Spans


async def build(
    job: GRPOJob, outside: Outside, stack: contextlib.AsyncExitStack, startup: StartupTimer
) -> TrainingLoop:
    """All parts of the loop, cheap checks first. Raises GRPOErrors."""
    spec, events, progress = job.spec, outside.events, outside.progress
    saver = Saver(
        outside.directory.checkpoints(spec.checkpoint.path),
        spec.checkpoint,
        outside.trainer,
        events.emit,
        progress.saved,
        progress.kept,
    )
    progress.set("Starting", f"looking for the model {spec.model.path}")
    with startup.part("model"):
        directory = await in_daemon_thread(resolve_model, spec.model.path, spec.model.revision)
    events.emit("info", "Model", f"Model: {directory}")
    await asyncio.to_thread(saver.prepare, parameter_count(directory) * CHECKPOINT_BYTES_PER_PARAMETER)
    estimator = _estimator(spec.algorithm.advantage_estimator)
    agent = load_agent(spec.rollout.agent, spec.rollout.agent_options) if spec.rollout.agent else None
    progress.set("Starting", "reading the data")
    with startup.part("data"):
        tokenizer, data, validation_prompts = await in_daemon_thread(_open_data, spec, directory, events)
    _check_decay(spec, data)
    options = dispatch_options(spec, tokenizer)
    with startup.part("rewards"):
        scorer = await _start_scorer(spec, tokenizer, outside, stack)
    make_dispatcher = _dispatchers(outside, None)
    if agent is not None and spec.rollout.agent is not None:
        runtime = await asyncio.to_thread(AgentRuntime, tokenizer.tokenizer)
        stack.callback(runtime.close)
        limit = spec.rollout.context_tokens(spec.data.max_prompt_length, spec.data.max_response_length)
        make_dispatcher = _dispatchers(outside, AgentSetup(spec.rollout.agent, agent, runtime, limit))

    progress.set("Starting", "waiting for the trainer")
    with startup.part("trainer"):
        await outside.trainer.connect(spec.failure_policy.startup_timeout_seconds)
    learner = Learner(spec, outside.trainer, estimator)
    model = await asyncio.to_thread(describe_model, spec.model.path, spec.model.revision, directory)
    with startup.part("resume"):
        resumed = await saver.resume(
            os.environ.get(RESUME) or spec.checkpoint.resume,
            lambda state: check_same_model(state.get("model", model), model),
        )
    step, updates, cursor = 0, 0, Cursor()
    if resumed is not None:
        point, state = resumed
        step, cursor = point.step, data.restore(state["data"])
        updates = state.get("updates", step * spec.actor.updates_per_step(spec.data.train_batch_size))
        learner.kl_controller.load_state_dict(state["kl_controller"])
        if saver.last is not None:
            progress.saved(saver.last)
        events.emit("info", "Resumed", f"Resuming from {point.path.name} at step {step}")
    schedule = _schedule(spec, data, cursor, step)
    keep = step if step > 0 else -1
    log = await asyncio.to_thread(_open_log, job, outside, keep=keep, total_steps=schedule.last_version)
    stack.push_async_callback(asyncio.to_thread, log.close)  # wandb may take its time
    progress.set("Starting", "waiting for the rollout servers")
    on_policy, halt = spec.rollout.max_staleness == 0, Halt()
    validation = Validation(validation_prompts, options, spec.rollout.validation, atomic=on_policy)
    parts = Parts(
        dataset=data,
        model=model,
        schedule=schedule,
        halt=halt,
        collector=Collector(spec, schedule, make_dispatcher, options, scorer, events.emit, halt),
        make_dispatcher=make_dispatcher,
        scorer=scorer,
        learner=learner,
        weights=outside.weights,
        saver=saver,
        validation=validation if validation_prompts else None,
        log=log,
        progress=progress,
        emit=events.emit,
        startup=startup,
        spans=outside.spans,
    )
    return TrainingLoop(spec, parts, updates)


def _estimator(name: str) -> AdvantageEstimator:
    return ESTIMATORS[name] if name in ESTIMATORS else load_function(name, "algorithm.advantageEstimator")


def _open_data(spec: Spec, model: Path, events: EventLog) -> tuple[TokenizerInfo, PromptDataset, list[Prompt]]:
    """Read and tokenise everything once. Raises DataError."""
    tokenizer = open_tokenizer(spec, model)
    for note in tokenizer.notes:
        events.emit("warning", "Tokenizer", note)
    data = open_training_data(spec, tokenizer.tokenizer)
    _tell_of_data(events, "Data", data.scan())
    validation_prompts, report = open_validation_prompts(spec, tokenizer.tokenizer)
    if report is not None:
        _tell_of_data(events, "Validation data", report)
    return tokenizer, data, validation_prompts


def _tell_of_data(events: EventLog, what: str, report: ScanReport) -> None:
    text = f"{what}: {report.kept} prompts, the longest of {report.longest_prompt_tokens} tokens"
    if report.dropped_overlong:
        text += f"; {report.dropped_overlong} over data.maxPromptLength left out"
    if report.truncated:
        text += f"; {report.truncated} cut to data.maxPromptLength"
    events.emit("info", "DataLoaded", text)


def _check_decay(spec: Spec, data: PromptDataset) -> None:
    """Raises ConfigError when the learning rate could not decay even in a run from the start."""
    steps = _schedule(spec, data, Cursor(), 0).last_version
    updates = steps * spec.actor.updates_per_step(spec.data.train_batch_size)
    check_decay(spec.actor.optim.lr_scheduler, spec.actor.optim.lr_warmup_steps, updates)


async def _start_scorer(
    spec: Spec, tokenizer: TokenizerInfo, outside: Outside, stack: contextlib.AsyncExitStack
) -> Scorer:
    reward, dynamic = spec.reward, spec.algorithm.filter_groups

    def refused(message: str) -> None:
        text = f"reward.function asks to be tried again, and is for {reward.retry_seconds:g} s (reward.retrySeconds): {message}"
        outside.events.emit("warning", "RewardTryAgain", text)

    pool = reward_pool(spec, refused)
    await stack.enter_async_context(pool)
    scorer = Scorer(
        pool,
        tokenizer.tokenizer,
        minimum_samples=min(2, spec.rollout.n),
        filter_metric=dynamic.metric if dynamic.enable else None,
        max_failure_ratio=reward.max_failure_ratio,
        spans=outside.spans,
    )
    stack.push_async_callback(scorer.close)
    return scorer


def reward_pool(spec: Spec, on_refusal: Callable[[str], None]) -> RewardPool:
    """The document's reward functions, to be entered."""
    reward = spec.reward
    return RewardPool(
        reward.function or PARTS,
        dict(reward.options) if reward.function else as_options(reward.parts, reward.options),
        reward.workers,
        reward.timeout_seconds,
        spec.failure_policy.startup_timeout_seconds,
        retry_seconds=reward.retry_seconds,
        on_refusal=on_refusal,
        concurrency=reward.concurrency,
        memory_limit_bytes=int(reward.memory_gib * 2**30) if reward.memory_gib else memory_share(reward.workers),
    )


def _schedule(spec: Spec, data: PromptDataset, cursor: Cursor, step: int) -> Schedule:
    dynamic = spec.algorithm.filter_groups
    return Schedule(
        data.iterate(cursor),
        cursor,
        batch_size=spec.data.train_batch_size,
        max_staleness=spec.rollout.max_staleness,
        max_gen_batches=dynamic.max_num_gen_batches if dynamic.enable else 1,
        version=step,
        prompts_left=data.prompts_left(cursor),
        last_version=spec.trainer.total_steps,
    )


def _open_log(job: GRPOJob, outside: Outside, *, keep: int, total_steps: int) -> RunLog:
    """`keep`: the step after which earlier records are set aside; -1: all of them."""
    trainer, directory = job.spec.trainer, outside.directory
    if lost := set_aside([directory.metrics, directory.ledger, directory.samples, directory.spans], keep):
        names = ", ".join(path.name for path in lost.files)
        why = f"going on from step {keep}" if keep >= 0 else "starting anew in a directory that holds an earlier run"
        outside.events.emit(
            "warning", "RecordsSetAside", f"{why}: records of steps {lost.first} to {lost.last} are kept in {names}"
        )
    loggers = open_loggers(
        trainer.loggers,
        directory.root,
        trainer.project_name,
        trainer.experiment_name or job.name,
        written_document(job),
        keep,
        lost=lost,
        total_steps=total_steps,
        events=outside.events,
    )
    return RunLog(
        loggers,
        StepFile(directory.ledger),
        StepFile(directory.samples),
        StepFile(directory.spans, SPANS_BYTES),
        SpanExporter.of_environment(job.name, job.metadata.namespace or "default"),
        trainer.log_samples,
        RolloutDump(directory.rollouts) if trainer.rollout_dump else None,
    )


def _dispatchers(outside: Outside, setup: AgentSetup | None) -> MakeDispatcher:
    """How dispatchers are made: for single turns, or for agents."""
    client, members, weights, emit = outside.client, outside.members, outside.weights, outside.events.emit

    def make(options: DispatchOptions, on_done: OnDone) -> RolloutDispatcher:
        if setup is None:
            return Dispatcher(client, members, weights, emit, options, on_done)
        return AgentDispatcher(client, members, weights, emit, options, setup, on_done)

    return make


def dispatch_options(spec: Spec, tokenizer: TokenizerInfo) -> DispatchOptions:
    rollout = spec.rollout
    return DispatchOptions(
        sampling=Sampling(
            n=rollout.n,
            max_tokens=spec.data.max_response_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            stop_token_ids=stop_token_ids(tokenizer, rollout.stop, rollout.stop_token_ids),
        ),
        purpose="train",
        seed=rollout.seed if rollout.seed_per_request else None,
        deadline_seconds=rollout.request_timeout_seconds,
        max_attempts=rollout.max_attempts,
        max_num_seqs=rollout.max_num_seqs,
        no_engine_timeout_seconds=spec.failure_policy.startup_timeout_seconds,
        log_probs_one_in=1
        if rollout.log_probs == "all" or spec.algorithm.rollout_correction.reads_engine
        else MISMATCH_ONE_IN,
    )
