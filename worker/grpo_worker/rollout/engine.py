"""The one module that drives vLLM: tokens in, tokens and log-probs out, and weights swapped under a running engine.

Invariant: the engine serves exactly the weights whose version and digest its workers report. A pull that fails leaves
the old weights serving and generation running; a swap that fails half-way leaves the engine paused and marked as having
no version, until another swap succeeds.

Run with vLLM 0.32.0 (CPU). Written against the sources of 0.26, 0.28 and 0.33: what differs between them is asked for
by feature (`weight_versions` on outputs, `finish_weight_update(weight_version)`), never by version number.
"""

import asyncio
import gc
import inspect
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
import torch
import xxhash

from grpo_worker.concurrency import Gate, in_daemon_thread
from grpo_worker.errors import DeviceError, GRPOError, PeerLostError, StalledError
from grpo_worker.model_files import resolve_model
from grpo_worker.protocol.messages import (
    ApplyWeightsReply,
    ApplyWeightsRequest,
    Array,
    SampleResult,
    Sampling,
    VersionSpan,
)
from grpo_worker.rollout.options import (
    EngineOptions,
    engine_arguments,
    engine_environment,
    log_configuration,
    startup_error,
)
from grpo_worker.rollout.staging import StagingMemory
from grpo_worker.rollout.versions import INITIAL_VERSION, VersionTrack, version_of_tag
from grpo_worker.weightsync.client import pull
from grpo_worker.weightsync.manifest import SnapshotManifest, expected_tensors, verify

log = logging.getLogger(__name__)

STATS = ("running", "waiting", "kv_cache_usage", "generated_tokens_total", "preemptions_total")


class EngineDeadError(DeviceError):
    """The engine's process is gone; this process must be started again."""

    reason = "EngineDead"


class WeightsNotAppliedError(PeerLostError):
    """The swap failed half-way: the engine waits, paused, for another one."""

    reason = "WeightsNotApplied"


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a prompt: the same on every server and in every batch, and unrelated between prompts
    with adjacent seeds (vLLM's own n > 1 uses seed + index)."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{index}".encode()) >> 1


class RunningPrompt:
    """The samples of one prompt that the engine is working on."""

    def __init__(self, engine: "RolloutEngine", ids: list[str], collectors: list[Any]) -> None:
        self._engine, self._ids, self._collectors = engine, ids, collectors

    async def results(self) -> list[SampleResult]:
        """Wait for all samples. Raises EngineDeadError, or what vLLM says about this request."""
        return [
            await self._engine._collect(name, queue) for name, queue in zip(self._ids, self._collectors, strict=True)
        ]

    async def abort(self) -> None:
        """Take what is unfinished out of the engine."""
        await self._engine._abort(self._ids)


class RolloutEngine:
    """One `AsyncLLM` and its weights."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.on_gpu = torch.cuda.is_available()
        self.gate = Gate()
        self.weight_version: int | None = None  # None: never synced, or a swap failed half-way
        self.weight_digest: str | None = None
        self.broken: str = ""  # why the weights cannot be used, after a swap that failed half-way
        self._llm: Any = None
        self._staging = StagingMemory()
        self._apply_lock = asyncio.Lock()
        self._serials = itertools.count()
        self._tracks: dict[str, VersionTrack] = {}
        self._stats = dict.fromkeys(STATS, 0.0)
        self._served_version = INITIAL_VERSION
        self._cache_salt = "0"  # requests share cached prefixes with those that were admitted since the same swap alone

    async def start(self) -> None:
        """Load the model. Minutes for a large one; the event loop stays free.

        Raises:
            DataError: no usable model at `model.path`. ConfigError: not enough memory (vLLM's numbers), or a wrong
                argument.
            DeviceError: CUDA or NCCL failed.
        """
        started = time.monotonic()
        directory = await in_daemon_thread(self._load)
        config = self._llm.model_config
        self.vocab_size: int = config.get_vocab_size()
        self.max_model_len: int = config.max_model_len
        dtype = str(config.dtype).removeprefix("torch.")
        self._dtypes = frozenset({dtype, "float32"})  # the engine casts float32 as its own loader would
        await self._warm_up()
        self._labels_weights = "weight_version" in inspect.signature(self._llm.finish_weight_update).parameters
        log.info(
            "engine is up after %.1f s: %s, %s, context %d tokens",
            time.monotonic() - started,
            directory,
            dtype,
            self.max_model_len,
        )

    def _load(self) -> Path:
        """Runs in a thread. Returns the model's directory."""
        directory = resolve_model(self.options.model.path, self.options.model.revision)
        self._expected, self._optional = expected_tensors(directory)
        with tempfile.TemporaryDirectory(prefix="grpo-rollout-") as folder:
            log_file, log_config = Path(folder, "engine.log"), Path(folder, "logging.json")
            log_config.write_text(json.dumps(log_configuration(log_file)))
            os.environ.update(engine_environment(self.options, self.on_gpu, log_config))
            try:
                self._llm = self._create(directory)
            except Exception as error:  # vLLM raises anything; the cause is in its workers' log
                text = log_file.read_text() if log_file.exists() else ""
                raise startup_error(error, text, self.options, self.on_gpu) from error
            finally:
                os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None)  # the file goes; the handlers that it made stay
        return directory

    async def _warm_up(self) -> None:
        """vLLM sets up the last things at the first token (seconds on CPU): no request's deadline shall pay for
        that."""
        group = await self.admit(
            "warm-up", [0], Sampling(n=1, max_tokens=2, temperature=1.0, top_p=1.0, top_k=-1), seed=0
        )
        await group.results()

    def _create(self, directory: Path) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self.options, directory, self.on_gpu)
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[self._stat_logger])

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

    async def admit(self, name: str, prompt: Sequence[int], sampling: Sampling, seed: int | None) -> RunningPrompt:
        """Hand the samples of one prompt to the engine, in order. The caller has checked the prompt (vLLM does not: it
        has no tokenizer here) and holds the gate.

        Args:
            name: for logs.
            prompt: token ids.
        """
        ids: list[str] = []
        collectors: list[Any] = []
        try:
            serial = next(self._serials)  # a repeated request may meet its predecessor
            for index in range(sampling.n):
                identifier = f"{name}#{index}.{serial}"
                parameters = self._parameters(sampling, None if seed is None else sample_seed(seed, index))
                ids.append(identifier)
                self._tracks[identifier] = VersionTrack([(self._served_version, 0)])
                collectors.append(
                    await self._llm.add_request(
                        identifier, {"prompt_token_ids": list(prompt), "cache_salt": self._cache_salt}, parameters
                    )
                )
        except BaseException as error:
            await self._abort(ids)
            if self.dead:
                raise self._dead_error() from error
            raise
        return RunningPrompt(self, ids, collectors)

    async def pause(self) -> None:
        """Freeze generation and forget cached prefixes. Requests that come now wait in order."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)

    async def resume(self) -> None:
        """Go on, unless a swap failed half-way: then only a swap that succeeds makes the engine run."""
        if not self.broken:
            await self._llm.resume_generation()

    def _parameters(self, sampling: Sampling, seed: int | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=1, max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
            min_p=sampling.min_p, seed=seed, stop_token_ids=list(sampling.stop_token_ids), ignore_eos=sampling.ignore_eos,
            logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    async def _collect(self, name: str, collector: Any) -> SampleResult:
        try:
            output = (await collector.get()).outputs[0]
        except Exception as error:
            if self.dead:
                raise self._dead_error() from error
            raise
        tokens, log_probs = Array.of(output.token_ids, "int32"), Array.of(output.logprobs.logprobs, "float32")
        track = self._tracks.pop(name)
        spans = track.spans(len(output.token_ids))
        if (labelled := getattr(output, "weight_versions", None)) is not None:
            spans = [VersionSpan(version_of_tag(span.version), span.start, span.end) for span in labelled]
        finish = output.finish_reason if output.finish_reason in ("stop", "length") else "abort"
        return SampleResult(
            token_ids=tokens,
            log_probs=log_probs,
            finish_reason=cast(Literal["stop", "length", "abort"], finish),
            versions=spans,
        )

    async def _abort(self, ids: list[str]) -> None:
        running = [name for name in ids if self._tracks.pop(name, None) is not None]
        if running and not self.dead:
            await self._llm.abort(running)

    # --- weights ------------------------------------------------------------------------------------------------------

    async def apply_weights(self, request: ApplyWeightsRequest) -> ApplyWeightsReply:
        """Pull a version beside running generation, then swap it in: pause(keep), start, update, finish, resume.

        Raises:
            PeerLostError, WeightsDamagedError, VersionNotHeldError, ConfigError: the pull failed; the old weights
            serve.
            WeightsMismatchError: the tensors do not fit the model; the old weights serve.
            WeightsNotAppliedError: the swap failed half-way; the engine waits for another one.
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
            manifest = await in_daemon_thread(self._pull, request, deadline)
            pulled = time.perf_counter()
            try:
                async with asyncio.timeout(deadline - time.monotonic()), self.gate.shared(pass_waiting=True):
                    paused = time.perf_counter()
                    apply_seconds = await self._swap(request, manifest)
            except TimeoutError as error:
                raise StalledError(
                    f"weights of version {request.version} were not swapped in within {request.timeout_seconds} s: {self.broken or 'engine was busy'}"
                ) from error
        finally:
            self._apply_lock.release()
        ended = time.perf_counter()
        return ApplyWeightsReply(
            version=cast(int, self.weight_version), digest=cast(str, self.weight_digest), bytes=manifest.total_bytes,
            pull_seconds=pulled - started, apply_seconds=apply_seconds, pause_seconds=ended - paused, total_seconds=ended - started,
        )  # fmt: skip

    def _pull(self, request: ApplyWeightsRequest, deadline: float) -> SnapshotManifest:
        """Runs in a thread: generation goes on."""
        return pull(
            request.store, token=self.options.token, into=self._staging.reserve, streams=self.options.network.weight_sync_streams,
            timeout_seconds=self.options.network.member_timeout_seconds, deadline=deadline,
            check=lambda manifest: verify(manifest, self._expected, optional=self._optional, dtypes=self._dtypes),
        )  # fmt: skip

    async def _swap(self, request: ApplyWeightsRequest, manifest: SnapshotManifest) -> float:
        """Seconds that the workers needed to load the staged weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            await self._llm.pause_generation(mode="keep", clear_cache=request.clear_cache)
            self._cache_salt = str(
                int(self._cache_salt) + 1
            )  # here: what is admitted from now on runs with the new weights
            if self.broken:
                await self._end_stale_session()
            began = time.perf_counter()
            await self._llm.start_weight_update()
            update = {"path": self._staging.path, "manifest": msgspec.msgpack.encode(manifest)}
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update))
            label = {"weight_version": str(manifest.version)} if self._labels_weights else {}
            await self._llm.finish_weight_update(**label)
            apply_seconds = time.perf_counter() - began
            applied = [tuple(state or ()) for state in await self._llm.collective_rpc("grpo_applied_weights")]
            if set(applied) != {(request.version, request.store.digest)}:
                raise WeightsNotAppliedError(
                    f"workers report {applied} instead of ({request.version}, {request.store.digest})"
                )
        except BaseException as error:
            self.weight_version = self.weight_digest = None
            self.broken = f"the swap to version {manifest.version} failed: {type(error).__name__}: {error}"
            if self.dead:
                raise self._dead_error() from error
            if not isinstance(error, Exception):
                raise
            raise WeightsNotAppliedError(
                f"{self.broken}. The engine is paused until a sync succeeds; start the replica again if it does not."
            ) from error
        self._note_swap(manifest.version)
        self.weight_version, self.weight_digest, self.broken = manifest.version, request.store.digest, ""
        await self._llm.resume_generation()
        return apply_seconds

    async def _end_stale_session(self) -> None:
        """A swap that was cut off between start and finish leaves vLLM's session open, and then every start is
        refused."""
        try:
            await self._llm.finish_weight_update()
        except Exception as error:
            log.info("no weight update was open: %s", error)

    def _note_swap(self, version: int) -> None:
        """Generation stands still: what each request has now was made by the old weights."""
        self._served_version = version
        for state in list(self._llm.output_processor.request_states.values()):
            if (track := self._tracks.get(state.external_req_id)) is not None:
                track.swapped(version, state.detokenizer.num_output_tokens())

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def dead(self) -> bool:
        return self._llm is not None and bool(self._llm.errored)

    async def check_health(self) -> None:
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
        """End the engine's processes."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
            gc.collect()  # its finalizer shuts down once more, and fails when it runs after its modules are gone
        self._staging.close()

    def _dead_error(self) -> GRPOError:
        return EngineDeadError(
            "rollout: the engine's process has ended; its log above says why. The replica must be started again."
        )


def numpy_tokens(array: Array) -> np.ndarray:
    """Token ids of a message as int64 [tokens]."""
    return array.numpy().astype(np.int64, copy=False)
