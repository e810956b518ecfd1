"""When a replica is ready, and what its start-up errors say."""

from pathlib import Path

import pytest
from replica_helpers import engine_options

from grpo_worker.errors import ConfigError, DeviceError, MemoryFullError
from grpo_worker.protocol.messages import HeartbeatReply, VersionSpan
from grpo_worker.rollout.heartbeat import unready_reason
from grpo_worker.rollout.options import engine_environment, startup_error
from grpo_worker.rollout.requests import VersionTrack


@pytest.mark.parametrize(
    ("version", "policy", "staleness", "age", "problem", "reason"),
    [
        (5, 5, 0, 0, "", ""),
        (4, 5, 0, 0, "", "weight version 4 is outside [5, 5]"),
        (4, 5, 1, 0, "", ""),
        (3, 5, 1, 0, "", "weight version 3 is outside [4, 5]"),
        (6, 5, 1, 0, "", "weight version 6 is outside [4, 5]"),
        (None, 5, 1, 0, "", "no weights were applied yet; policy version 5 is current"),
        (5, None, 1, 0, "", "the coordinator has no policy version yet"),
        (5, 5, 0, 31, "", "the coordinator has not answered for 31 s (limit 30 s)"),
        (5, 5, 0, 0, "the engine is dead", "the engine is dead"),
    ],
)
def test_ready_means_a_healthy_engine_a_present_coordinator_and_current_weights(
    version: int | None, policy: int | None, staleness: int, age: float, problem: str, reason: str
) -> None:
    reply = HeartbeatReply(incarnation="a", policy_version=policy, max_staleness=staleness)
    assert (
        unready_reason(
            engine_problem=problem, weight_version=version, reply=reply, reply_age_seconds=age, lost_after_seconds=30
        )
        == reason
    )


def test_before_the_first_answer_a_replica_is_not_ready() -> None:
    reason = unready_reason(engine_problem="", weight_version=5, reply=None, reply_age_seconds=0, lost_after_seconds=30)
    assert reason == "the coordinator has not answered yet"


@pytest.mark.parametrize(
    ("changes", "tokens", "spans"),
    [
        ([(-1, 0)], 3, [(-1, 0, 3)]),
        ([(1, 0), (2, 2)], 5, [(1, 0, 2), (2, 2, 5)]),
        ([(1, 0), (2, 0)], 5, [(2, 0, 5)]),  # swapped before its first token
        ([(1, 0), (2, 2), (3, 2)], 5, [(1, 0, 2), (3, 2, 5)]),  # two swaps without a token between them
        ([(1, 0), (2, 5)], 5, [(1, 0, 5)]),  # finished when the second came
        ([(1, 0)], 0, []),
    ],
)
def test_spans_cover_a_response_without_gap(
    changes: list[tuple[int, int]], tokens: int, spans: list[tuple[int, int, int]]
) -> None:
    assert VersionTrack(changes).spans(tokens) == [VersionSpan(*span) for span in spans]


OPTIONS = engine_options("m", 4096)
KV_CACHE = (
    "Traceback ...\nValueError: To serve at least one request with the model's max seq len (4096), (2.0 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (1.0 GiB). Try decreasing `max_model_len`.\n"
)


@pytest.mark.parametrize(
    ("log", "raised", "on_gpu", "kind", "parts"),
    [
        (
            KV_CACHE,
            "Engine core initialization failed",
            False,
            ConfigError,
            ["2.0 GiB KV cache", "rollout.cpuKVCacheGiB (now 1)", "4096"],
        ),
        (
            KV_CACHE,
            "Engine core initialization failed",
            True,
            MemoryFullError,
            ["rollout.gpuMemoryUtilization (now 0.6)", "data.maxResponseLength", "actor.fsdp.paramOffload"],
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "failed", True, MemoryFullError, ["CUDA out of memory"]),
        (
            "ValueError: Free memory on device (1.0/79.1 GiB) on startup is less than desired GPU memory utilization (0.6, 47.5 GiB).",
            "failed",
            True,
            MemoryFullError,
            ["Free memory on device (1.0/79.1 GiB)", "(now 0.6)"],
        ),
        ("RuntimeError: CUDA error: an illegal memory access", "failed", True, DeviceError, ["illegal memory access"]),
        ("", "unknown architecture", False, ConfigError, ["unknown architecture", "did not start with m"]),
    ],
)
def test_a_failed_start_says_what_vllm_said_and_what_to_change(
    log: str, raised: str, on_gpu: bool, kind: type[Exception], parts: list[str]
) -> None:
    error = startup_error(RuntimeError(raised), log, OPTIONS, on_gpu)
    assert type(error) is kind
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_engine_is_stepped_in_our_process_and_its_workers_are_spawned(on_gpu: bool) -> None:
    variables = engine_environment(engine_options("m", 1, cpu_kv_cache_gib=3), on_gpu, Path("log.json"))
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert variables["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert variables.get("VLLM_CPU_KVCACHE_SPACE") == (None if on_gpu else "3")
