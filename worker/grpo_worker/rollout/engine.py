"""The one module that drives vLLM: tokens in, tokens and log-probs out, and weights swapped under a running engine.

Invariant: the engine serves exactly the weights whose version and digest its workers report. A pull that fails leaves
the old weights serving and generation running; a swap that fails half-way leaves the engine paused and marked as having
no version, until another swap succeeds. An engine that sleeps has no weights: the swap that brings some wakes it.

Run with vLLM 0.32.0 (CPU). Written against the sources of 0.26, 0.28 and 0.33: `LLMEngine` and its in-process core, which
vLLM's own `LLM` runs on.
"""

import asyncio
import gc
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch

from grpo_worker.concurrency import Gate, in_daemon_thread
from grpo_worker.errors import DeviceError, GRPOError, PeerLostError, StalledError
from grpo_worker.model_files import resolve_model
from grpo_worker.protocol.messages import (
    ApplyWeightsReply,
    ApplyWeightsRequest,
    Array,
    PromptRequest,
    Sampling,
    SleepReply,
    SleepRequest,
    StoreSource,
)
from grpo_worker.rollout.options import (
    EngineOptions,
    engine_arguments,
    engine_environment,
    log_configuration,
    startup_error,
)
from grpo_worker.rollout.requests import (
    INITIAL_VERSION,
    Request,
    RunningPrompt,
    SampledLogProbs,
    VersionTrack,
    sample_seed,
    sampling_parameters,
)
from grpo_worker.rollout.stepping import EngineThread
from grpo_worker.weightsync.broadcast import WeightGroupError
from grpo_worker.weightsync.client import pull
from grpo_worker.weightsync.host_memory import HostMemory
from grpo_worker.weightsync.manifest import TensorSpec, expected_tensors, layout, verify

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 10.0
# What sleeps, as vLLM calls it. Weights are not kept (level 2): those that wake the engine are newer.
SLEEPING, SLEEP_LEVEL = ("weights", "kv_cache"), 2
STATS = ("running", "waiting", "kv_cache_usage", "generated_tokens_total", "preemptions_total")


class EngineDeadError(DeviceError):
    """A step failed, or a worker process has gone; this process must be started again."""

    reason = "EngineDead"


class WeightsNotAppliedError(PeerLostError):
    """The swap failed half-way: the engine waits, paused, for another one."""

    reason = "WeightsNotApplied"


class RolloutEngine:
    """One vLLM engine and its weights."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.on_gpu = torch.cuda.is_available()
        self.gate = Gate()
        self.weight_version: int | None = None  # None: never synced, or a swap failed half-way
        self.weight_digest: str | None = None
        self.broken: str = ""  # why the weights cannot be used, after a swap that failed half-way
        self._thread = EngineThread(self._take, self._fail_all)
        self._staging = HostMemory()
        self._staged = b""  # manifest of what the staging memory holds
        self._tensors: list[TensorSpec] = []  # of the trainer's model, in its order
        self._apply_lock = asyncio.Lock()
        # What follows belongs to the engine's thread.
        self._serials = itertools.count()
        self._requests: dict[str, Request] = {}
        self._stats = dict.fromkeys(STATS, 0.0)
        self._served_version = INITIAL_VERSION
        self._asleep: set[str] = set()  # of SLEEPING
        self._cache_salt = 0  # requests share cached prefixes with those that were admitted since the same swap alone

    async def start(self) -> None:
        """Load the model. Minutes for a large one; the event loop stays free.

        Raises:
            DataError: no usable model at `model.path`. ConfigError: not enough memory (vLLM's numbers), or a wrong
                argument.
            DeviceError: CUDA or NCCL failed.
        """
        started = time.monotonic()
        directory = await self._thread.between_steps(self._load)
        config = self._llm.model_config
        self.vocab_size: int = config.get_vocab_size()
        self.max_model_len: int = config.max_model_len
        dtype = str(config.dtype).removeprefix("torch.")
        self._dtypes = frozenset({dtype, "float32"})  # the engine casts float32 as its own loader would
        self._devices = await self._thread.between_steps(lambda: tuple(self._llm.collective_rpc("grpo_device")))
        await self._warm_up()
        log.info(
            "engine is up after %.1f s: %s, %s, context %d tokens",
            time.monotonic() - started,
            directory,
            dtype,
            self.max_model_len,
        )

    def _load(self) -> Path:
        """Returns the model's directory."""
        directory = resolve_model(self.options.model.path, self.options.model.revision)
        self._expected, self._optional = expected_tensors(directory)
        with tempfile.TemporaryDirectory(prefix="grpo-rollout-") as folder:
            log_file, log_config = Path(folder, "engine.log"), Path(folder, "logging.json")
            log_config.write_text(json.dumps(log_configuration(log_file)))
            os.environ.update(engine_environment(self.options, self.on_gpu, log_config))
            try:
                self._thread.create(lambda: self._create(directory))
            except GRPOError:
                raise
            except Exception as error:  # vLLM raises anything; the cause may be in its workers' log
                text = log_file.read_text() if log_file.exists() else ""
                raise startup_error(error, text, self.options, self.on_gpu) from error
            finally:
                os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None)  # the file goes; the handlers that it made stay
        return directory

    async def _warm_up(self) -> None:
        """vLLM sets up the last things at the first token (seconds on CPU): no request's deadline shall pay for
        that."""
        prompt = PromptRequest(id="warm-up", token_ids=Array.of([0], "int32"), seed=0)
        sampling = Sampling(n=1, max_tokens=2, temperature=1.0, top_p=1.0, top_k=-1)
        running, refused = await self.admit("start", [prompt], sampling)
        for error in refused.values():
            raise error
        await running[prompt.id].results()

    def _create(self, directory: Path) -> Any:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        kv_cache_bytes = None
        if self.options.colocated and self.on_gpu:
            from vllm.platforms import current_platform

            kv_cache_bytes = self.options.kv_cache_bytes(directory, current_platform.get_device_total_memory())
        arguments = engine_arguments(self.options, directory, self.on_gpu, kv_cache_bytes)
        return LLMEngine.from_engine_args(EngineArgs(**arguments), stat_loggers=[self._stat_logger])

    def _stat_logger(self, *_: Any) -> Any:
        """For `stats`, beside vLLM's own gauges: those belong to the process, whose next engine takes them away."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        stats = self._stats

        class Recorder(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def log_engine_initialized(self) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None:
                    stats["running"] = scheduler_stats.num_running_reqs
                    # from 0.28 on those that wait for something else than room are counted apart
                    stats["waiting"] = scheduler_stats.num_waiting_reqs + getattr(
                        scheduler_stats, "num_skipped_waiting_reqs", 0
                    )
                    stats["kv_cache_usage"] = scheduler_stats.kv_cache_usage
                if iteration_stats is not None:
                    stats["generated_tokens_total"] += iteration_stats.num_generation_tokens
                    stats["preemptions_total"] += iteration_stats.num_preempted_reqs

        return Recorder()

    # --- generation ---------------------------------------------------------------------------------------------------

    async def admit(
        self, name: str, prompts: Sequence[PromptRequest], sampling: Sampling
    ) -> tuple[dict[str, RunningPrompt], dict[str, Exception]]:
        """Hand prompts to the engine at one moment: its next step sees all of their samples, in order. The caller has checked the
        prompts (vLLM does not: it has no tokenizer here) and holds the gate. When it is cancelled meanwhile, nothing stays in the engine.

        Args:
            name: for logs.

        Returns:
            By prompt id: those that run, and vLLM's errors of those that it refused.

        Raises:
            EngineDeadError.
        """
        admission = self._thread.submit(self._admit, name, prompts, sampling)
        try:
            return await asyncio.wrap_future(admission)
        except asyncio.CancelledError:
            if not admission.cancelled():  # it has begun; behind it the prompts are known
                self._thread.submit(lambda: self._abort(list(admission.result()[0].values())))
            raise

    def _admit(
        self, name: str, prompts: Sequence[PromptRequest], sampling: Sampling
    ) -> tuple[dict[str, RunningPrompt], dict[str, Exception]]:
        self.check_health()
        running: dict[str, RunningPrompt] = {}
        refused: dict[str, Exception] = {}
        for prompt in prompts:
            inputs = {"prompt_token_ids": numpy_tokens(prompt.token_ids).tolist(), "cache_salt": str(self._cache_salt)}
            group = RunningPrompt(sampling.n)
            serial = next(self._serials)  # a repeated request may meet its predecessor
            try:
                for index in range(sampling.n):
                    seed = None if prompt.seed is None else sample_seed(prompt.seed, index)
                    identifier = f"{name}/{prompt.id}#{index}.{serial}"
                    parameters = sampling_parameters(sampling, seed, prompt.log_probs)
                    own_name = self._llm.add_request(identifier, inputs, parameters)
                    group.unfinished[identifier] = index
                    if prompt.log_probs:
                        self._llm.output_processor.request_states[own_name].logprobs_processor = SampledLogProbs()
                    self._requests[identifier] = Request(group, VersionTrack([(self._served_version, 0)]))
                running[prompt.id] = group
            except Exception as error:
                self._abort([group])
                refused[prompt.id] = error
        return running, refused

    def abort(self, prompts: Sequence[RunningPrompt]) -> None:
        """Take what is unfinished out of the engine, before whatever is asked of it later."""
        self._thread.submit(self._abort, list(prompts))

    def _abort(self, prompts: list[RunningPrompt]) -> None:
        names = [name for prompt in prompts for name in prompt.unfinished]
        for name in names:
            del self._requests[name]
        for prompt in prompts:
            prompt.unfinished.clear()
        if names and not self.dead:
            self._llm.abort_request(names)

    def _take(self, outputs: list[Any]) -> None:
        for output in outputs:
            if output.finished and (request := self._requests.pop(output.request_id, None)) is not None:
                sample = output.outputs[0]
                request.prompt.finished(output.request_id, sample, request.track.spans(len(sample.token_ids)))

    def _fail_all(self) -> None:
        prompts = {id(request.prompt): request.prompt for request in self._requests.values()}
        self._requests.clear()
        for prompt in prompts.values():
            prompt.failed(self._dead_error())

    # --- weights ------------------------------------------------------------------------------------------------------

    async def apply_weights(self, request: ApplyWeightsRequest) -> ApplyWeightsReply:
        """Pull a version beside running generation, then swap it in between two steps.

        Raises:
            PeerLostError, WeightsDamagedError, VersionNotHeldError, ConfigError: the pull failed; the old weights
            serve.
            WeightsMismatchError: the tensors do not fit the model; the old weights serve.
            WeightsNotAppliedError: the swap failed half-way; the engine waits for another one.
            WeightGroupError: no version has come from the store yet.
            StalledError: not done within the request's limit. EngineDeadError: the engine is gone.
        """
        started = time.perf_counter()
        deadline = time.monotonic() + request.timeout_seconds
        try:
            async with asyncio.timeout(request.timeout_seconds):
                await self._apply_lock.acquire()
        except TimeoutError as error:
            raise StalledError(
                f"weights of version {request.version}: another sync held the engine for {request.timeout_seconds} s"
            ) from error
        try:
            if request.store is not None:
                # A swap that outlived its request still reads the staging memory.
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._thread.between_steps(self.check_health)
                await in_daemon_thread(self._pull, request.store, deadline)
            elif not self._tensors:
                raise WeightGroupError(
                    "this engine does not know the tensors that come over a group: it needs a version from the store first"
                )
            pulled = time.perf_counter()
            async with asyncio.timeout(deadline - time.monotonic()), self.gate.shared(pass_waiting=True):
                paused = time.perf_counter()
                apply_seconds = await self._thread.between_steps(self._swap, request)
        except TimeoutError as error:
            raise StalledError(
                f"weights of version {request.version} were not swapped in within {request.timeout_seconds} s: {self.broken or 'engine was busy'}"
            ) from error
        finally:
            self._apply_lock.release()
        ended = time.perf_counter()
        return ApplyWeightsReply(
            version=cast(int, self.weight_version), digest=cast(str, self.weight_digest), bytes=layout(self._tensors)[1],
            pull_seconds=pulled - started if request.store else 0.0, apply_seconds=apply_seconds, pause_seconds=ended - paused, total_seconds=ended - started,
            devices=self._devices,
        )  # fmt: skip

    async def sleep(self, request: SleepRequest) -> SleepReply:
        """Give back the memory of weights and KV cache, once no request runs. An engine that sleeps already stays so.

        Raises:
            StalledError: requests ran on for longer than the limit. EngineDeadError: the engine is gone, or could not.
        """
        try:
            async with asyncio.timeout(request.timeout_seconds), self._apply_lock, self.gate.exclusive():
                return SleepReply(device_bytes=await self._thread.between_steps(self._fall_asleep))
        except TimeoutError as error:
            raise StalledError(f"the engine was still busy after {request.timeout_seconds} s") from error

    def _fall_asleep(self) -> int:
        self.check_health()
        if self._asleep:
            return 0
        try:
            used = self._llm.collective_rpc("grpo_forget_weights")
            self._llm.sleep(SLEEP_LEVEL)
        except Exception as error:
            self._thread.fail(error)  # what it still has nobody knows
            self.check_health()
        self._asleep = set(SLEEPING)
        self.forget_version()
        return max(used)

    def _wake(self, what: str) -> None:
        if what in self._asleep:
            self._llm.wake_up([what])
            self._asleep.remove(what)

    def _pull(self, store: StoreSource, deadline: float) -> None:
        """Into the staging memory. Runs in a thread: generation goes on."""
        manifest = pull(
            store, token=self.options.token, into=self._staging.reserve, streams=self.options.network.weight_sync_streams,
            timeout_seconds=self.options.network.member_timeout_seconds, deadline=deadline,
            check=lambda manifest: verify(manifest, self._expected, optional=self._optional, dtypes=self._dtypes),
        )  # fmt: skip
        self._staged = msgspec.msgpack.encode(manifest)
        self._tensors = [TensorSpec(entry.name, entry.shape, entry.dtype) for entry in manifest.tensors]

    def _swap(self, request: ApplyWeightsRequest) -> float:
        """Between two steps. Seconds that the workers needed to load the staged weights, or to get and load them."""
        self.check_health()
        before, asleep = self._applied(), bool(self._asleep)
        core = self._llm.engine_core.engine_core
        core.pause_scheduler("keep", clear_cache=False)
        try:
            self._thread.drain()  # batches under way were begun with the old weights
            self.check_health()
            if request.clear_cache and not self._llm.reset_prefix_cache(reset_running_requests=True):
                raise WeightsNotAppliedError("vLLM could not free the caches of the old weights")
            self._wake("weights")
            self._cache_salt += 1  # what is admitted from now on runs with the new weights
            began = time.perf_counter()
            self._llm.collective_rpc("start_weight_update")
            self._llm.collective_rpc("update_weights", kwargs={"update_info": self._update_info(request)})
            self._llm.collective_rpc("finish_weight_update")
            apply_seconds = time.perf_counter() - began
            applied = self._applied()
            version, digest = next(iter(applied)) if len(applied) == 1 else (None, "")
            if version != request.version or (request.store and digest != request.store.digest):
                raise WeightsNotAppliedError(
                    f"workers report {applied} instead of version {request.version} of {request.store or request.group}"
                )
            self._wake("kv_cache")
        except Exception as error:
            what = f"the swap to version {request.version} failed: {type(error).__name__}: {error}"
            if not self.dead:
                self._end_stale_session()
                if not self.broken and not asleep and self._applied() == before:
                    core.resume_scheduler()
                    raise WeightsNotAppliedError(f"{what}. The old weights serve.") from error
            self.weight_version = self.weight_digest = None
            self.broken = what
            self.check_health()
            raise WeightsNotAppliedError(
                f"{self.broken}. The engine is paused until a sync succeeds; start the replica again if it does not."
            ) from error
        self._note_swap(version)
        self.weight_version, self.weight_digest, self.broken = version, digest, ""
        core.resume_scheduler()
        return apply_seconds

    def _update_info(self, request: ApplyWeightsRequest) -> dict[str, Any]:
        """For `StoreTransferEngine` in the workers."""
        if request.group is None:
            return {"path": self._staging.path, "manifest": self._staged}
        return {"group": msgspec.msgpack.encode(request), "tensors": msgspec.msgpack.encode(self._tensors)}

    def _applied(self) -> set[Any]:
        """What the workers say of their weights: one version and digest, or () where an update failed half-way or there was none."""
        return {tuple(state or ()) for state in self._llm.collective_rpc("grpo_applied_weights")}

    def _end_stale_session(self) -> None:
        """A swap that failed between start and finish leaves vLLM's session open, and then every start is refused."""
        try:
            self._llm.collective_rpc("finish_weight_update")
        except Exception as error:
            log.info("no weight update was open: %s", error)

    def _note_swap(self, version: int) -> None:
        """What each request has now was made by the old weights."""
        self._served_version = version
        for state in self._llm.output_processor.request_states.values():
            if (request := self._requests.get(state.external_req_id)) is not None:
                request.track.swapped(version, state.detokenizer.num_output_tokens())

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def _llm(self) -> Any:
        return self._thread.engine

    @property
    def dead(self) -> bool:
        return self._thread.error is not None

    def check_health(self) -> None:
        """Raises EngineDeadError."""
        if self._llm is None or self.dead:
            raise self._dead_error()

    def forget_version(self) -> None:
        """The coordinator that numbered the weights is gone. They stay, without a version, until the next sync."""
        self.weight_version = self.weight_digest = None

    def stats(self) -> dict[str, float]:
        """What the scheduler said after its last step, by the names of `STATS`."""
        return dict(self._stats)

    def shutdown(self) -> None:
        """End the engine and its processes."""
        self._thread.end(SHUTDOWN_SECONDS)
        gc.collect()  # vLLM's finalizers fail when they run after their modules are gone
        self._staging.close()

    def _dead_error(self) -> GRPOError:
        return EngineDeadError(
            f"rollout: the engine has failed ({self._thread.error}); the log above says where. The replica must be started again."
        )


def numpy_tokens(array: Array) -> np.ndarray:
    """Token ids of a message as int64 [tokens]."""
    return array.numpy().astype(np.int64, copy=False)
