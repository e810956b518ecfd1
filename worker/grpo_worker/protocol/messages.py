"""Every message between coordinator, trainer and rollout server.

Invariant: token ids, masks and log-probs cross process borders as raw little-endian arrays (`Array`), never as text, and are
never re-tokenised: the ids that the engine sampled are the ids that the trainer scores.
"""

from typing import Literal

import msgspec
import numpy as np


class Array(msgspec.Struct, array_like=True, frozen=True):
    """A one-dimensional NumPy array on the wire: dtype name and little-endian bytes."""

    dtype: Literal["int32", "int64", "float32", "uint8"]
    data: bytes

    @classmethod
    def of(cls, values: "np.ndarray | list[int] | list[float]", dtype: str) -> "Array":
        return cls(dtype, np.ascontiguousarray(values, dtype=dtype).tobytes())  # type: ignore[arg-type]

    def numpy(self) -> np.ndarray:
        """Read-only view of the values, `[length]`."""
        return np.frombuffer(self.data, dtype=self.dtype)


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """The one error of the protocol: body of each reply with a status of 400 and above, as JSON; and what a trainer's rank tells the
    others when it ends."""

    reason: str  # a word of the contract, e.g. "InvalidRequest", "EngineDead", "StaleWeights", "OutOfMemory"
    message: str
    exit_code: int = 75  # of the process, if it ends with this error
    recoverable: bool = False  # nothing has changed and the process goes on


# --- membership ---------------------------------------------------------------------------------------------------------------


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """Worker -> coordinator, POST /v1/members, every `network.heartbeatSeconds`."""

    role: Literal["trainer", "rollout"]
    name: str  # stable over restarts, e.g. "rollout-0"
    instance: str  # new for each process start
    url: str
    state: Literal["starting", "ready", "failed"]
    weight_version: int | None = None  # the version that the engine serves; None before the first sync
    weight_digest: str | None = None
    message: str = ""
    terminating: str = ""  # the process (of any rank) that got SIGTERM while the job goes on
    stats: dict[str, float] = {}  # e.g. running, waiting, kv_cache_usage, generated_tokens_total, memory_bytes


class HeartbeatReply(msgspec.Struct, frozen=True, kw_only=True):
    """Coordinator's answer. A replica is ready only while its version is within [`policy_version` - `max_staleness`, `policy_version`]."""

    incarnation: str  # new for each start of the coordinator: versions of another incarnation are not comparable
    policy_version: int | None
    max_staleness: int
    stop: bool = False  # the job is over: end with exit code 0
    hold: bool = False  # the trainer has the devices: an engine that shares them does not load yet


# --- rollout ------------------------------------------------------------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int  # -1: all
    min_p: float = 0.0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False


class PromptRequest(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    token_ids: Array  # int32 [prompt tokens]
    seed: int | None = None  # sample i of the group uses a stream derived from (seed, i)
    log_probs: bool = True  # False: nobody reads them, and the engine need not take them off its device


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Coordinator -> rollout, POST /v1/generate. The reply is a stream of frames (codec.frame), one `GroupResult` a prompt as it
    finishes, then one `GenerateEnd`."""

    request_id: str
    prompts: list[PromptRequest]
    sampling: Sampling
    deadline_seconds: float
    # Admit all prompts to the engine before it runs any of them: the batches that the engine forms, and so every bit of the
    # result, then depend on this request alone. Needs an otherwise idle engine.
    atomic: bool = False
    min_weight_version: int | None = None  # refuse (409) when the engine serves an older version


class VersionSpan(msgspec.Struct, array_like=True, frozen=True):
    """Tokens [start, end) of a response were sampled with `version`."""

    version: int
    start: int
    end: int


class SampleResult(msgspec.Struct, frozen=True, kw_only=True):
    token_ids: Array  # int32 [response tokens], the stop token included
    log_probs: (
        Array  # float32 [response tokens], of the whole vocabulary at the run's temperature; empty where not asked for
    )
    finish_reason: Literal["stop", "length", "abort"]
    versions: list[VersionSpan]


class GroupResult(msgspec.Struct, frozen=True, kw_only=True, tag="group"):
    id: str
    samples: list[SampleResult]
    error: str | None = None  # then samples is empty
    error_kind: Literal["", "prompt_too_long", "token_out_of_range", "deadline", "engine", "engine_dead"] = ""


class GenerateEnd(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    request_id: str
    seconds: float
    generated_tokens: int


class StoreSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where the `store` transport's snapshot of one version is served (by trainer rank 0)."""

    host: str
    port: int
    version: int
    digest: str  # of the manifest: names, shapes, dtypes, checksums
    total_bytes: int


class GroupPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A place in a group. With `nccl` that is the trainer's rank 0 and every worker of every engine; with `ipc` each trainer rank and the
    engine's worker on its device are a pair."""

    host: str  # where the members meet
    port: int
    generation: int  # a new one for each set of members
    rank: int  # of the member; of an engine's first worker; 0 sends
    world_size: int
    patience_seconds: float  # of a member, for another one
    bucket_bytes: int = 256 << 20  # that travel at a time; a larger tensor travels alone
    pair: int | None = None  # with `ipc`: the trainer rank of the pair; of an engine's first worker
    pairs: tuple[int, ...] = ()  # with `ipc`, to the trainer: its ranks that have a partner


class ApplyWeightsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Coordinator -> rollout, POST /v1/weights: swap between two steps of the engine to what was pulled from the store before, or
    comes over the group meanwhile."""

    version: int
    store: StoreSource | None = None
    group: GroupPlace | None = None  # in place of the store
    timeout_seconds: float
    clear_cache: bool = True  # False: running requests keep the KV cache that the old weights made


class ApplyWeightsReply(msgspec.Struct, frozen=True, kw_only=True):
    version: int  # read back from the engine's workers after the update, not echoed
    digest: str
    bytes: int
    pull_seconds: float  # network and verification; 0 over a group
    apply_seconds: float  # into the engine; over a group with the way
    pause_seconds: float  # generation stood still
    total_seconds: float
    devices: tuple[str, ...]  # of the engine's workers


class SleepRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Coordinator -> rollout, POST /v1/sleep: give the device to the trainer. The next weights wake the engine."""

    timeout_seconds: float


class SleepReply(msgspec.Struct, frozen=True, kw_only=True):
    device_bytes: int  # that were in use on the fullest of the engine's devices before, whoever had them; 0 on CPU


# --- trainer ------------------------------------------------------------------------------------------------------------------


class TrainBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Sequences as ragged arrays. `response_*` arrays are concatenated over sequences in order: [sum of response_lengths]."""

    prompt_lengths: Array  # int32 [sequences]
    response_lengths: Array  # int32 [sequences]
    token_ids: Array  # int32 [sum of prompt and response lengths], each sequence prompt then response
    response_mask: Array | None = None  # uint8; 0 takes a token out of the loss and its normaliser
    old_log_probs: Array | None = None  # float32; absent: the update's own forward is the old policy's
    rollout_log_probs: Array | None = None  # float32, the engine's; only without old_log_probs
    ref_log_probs: Array | None = None  # float32
    advantages: Array | None = None  # float32
    is_weights: Array | None = None  # float32, rollout correction; factor on the policy loss
    mini_batch_sequences: list[int] = []  # sequences of each optimizer step, in order; sums to the number of sequences


class LogProbsRequest(msgspec.Struct, frozen=True, kw_only=True, tag="compute_log_probs"):
    batch: TrainBatch
    actor: bool  # the current policy's log-probs and entropy
    reference: bool  # the reference model's log-probs


class LogProbsReply(msgspec.Struct, frozen=True, kw_only=True, tag="log_probs"):
    log_probs: Array | None  # float32 [response tokens]
    entropy: Array | None
    ref_log_probs: Array | None
    metrics: dict[str, float]


class UpdateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="update"):
    step: int  # 1-based number of the step that this update makes
    batch: TrainBatch
    total_steps: int = 0  # of the whole run, for learning rates that end with it; 0: unknown


class UpdateReply(msgspec.Struct, frozen=True, kw_only=True, tag="updated"):
    metrics: dict[str, float]  # verl's names, e.g. actor/pg_clipfrac; without old_log_probs also those of the mismatch


class PublishRequest(msgspec.Struct, frozen=True, kw_only=True, tag="publish"):
    """A version that was published before is refused when the weights have changed since."""

    version: int
    store: bool = True
    group: GroupPlace | None = None


class PublishReply(msgspec.Struct, frozen=True, kw_only=True, tag="published"):
    store: StoreSource | None = None
    digest: str = ""  # of what went over the group
    group_error: str = ""  # the group is of no use any more
    meeting_port: int = 0  # where a group's members meet, on the store's host
    device: str  # of rank 0
    seconds: float


class SaveRequest(msgspec.Struct, frozen=True, kw_only=True, tag="save"):
    """Write `actor/` and `state/` below `directory`. The reply comes when the state is copied (the next update may run);
    writing goes on in the background until `save_status` says it is done."""

    directory: str
    step: int


class SaveReply(msgspec.Struct, frozen=True, kw_only=True, tag="save_started"):
    stall_seconds: float


class SaveStatusRequest(msgspec.Struct, frozen=True, kw_only=True, tag="save_status"):
    wait_seconds: float = 0.0


class SaveStatusReply(msgspec.Struct, frozen=True, kw_only=True, tag="save_state"):
    done: bool
    error: str = ""
    files: dict[str, str] = {}  # path below the directory -> "xxh3:HEX"
    seconds: float = 0.0


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    directory: str


class LoadReply(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    step: int


class StopRequest(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    pass


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    pass


# POST /v1/trainer takes one of these as msgpack and answers with one of TrainerReply, or with an ErrorReply.
TrainerRequest = (
    LogProbsRequest | UpdateRequest | PublishRequest | SaveRequest | SaveStatusRequest | LoadRequest | StopRequest
)
TrainerReply = LogProbsReply | UpdateReply | PublishReply | SaveReply | SaveStatusReply | LoadReply | Done
