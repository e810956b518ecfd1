"""From a job to the trainer's options, and from exceptions to exit codes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import options_for, save_tiny_model, single_rank

from grpo_worker.config.job import GRPOJob
from grpo_worker.errors import DataError, StalledError
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.failures import OperationRefused, remote_error
from grpo_worker.trainer.options import TrainerOptions


def job(**spec: Any) -> GRPOJob:
    document = {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {"name": "small"},
        "spec": {
            "model": {"path": "/models/tiny"},
            "data": {"trainFiles": ["train.parquet"]},
            "reward": {"function": "gsm8k"},
            **spec,
        },
    }
    return GRPOJob.model_validate(document)


def test_what_the_document_leaves_open_follows_from_the_device() -> None:
    options = TrainerOptions.of(job(runtime={"device": "cpu"}).spec, {})
    assert (options.device, options.compute_dtype, options.rollout_dtype) == ("cpu", torch.float32, torch.float32)
    assert (options.compile, options.chunk_tokens, options.spec.actor.token_budget) == (False, 1024, 16384)
    assert options.host == options.advertised_host == "127.0.0.1"
    assert not options.reference
    on_gpu = TrainerOptions.of(job(runtime={"device": "cuda"}).spec, {})
    assert (on_gpu.compute_dtype, on_gpu.compile, on_gpu.chunk_tokens) == (torch.bfloat16, True, 4096)


@pytest.mark.parametrize(
    ("spec", "device", "groups"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"network": {"weightSync": "store"}}, "cuda", False),
        ({"network": {"weightSync": "nccl"}}, "cpu", True),
        ({"placement": "Colocated"}, "cpu", True),
    ],
)
def test_the_trainer_opens_a_meeting_point_where_weights_may_go_over_a_group(
    spec: dict[str, Any], device: str, groups: bool
) -> None:
    assert TrainerOptions.of(job(runtime={"device": device}, **spec).spec, {}).may_group is groups


def test_what_the_document_says_comes_before_the_device() -> None:
    spec = job(
        model={"path": "/models/tiny", "dtype": "float32", "compile": False, "headChunkSize": 64},
        runtime={"device": "cuda"},
        rollout={"dtype": "float16"},
        actor={"useKLLoss": True, "ppoMaxTokenLenPerGPU": 9000},
    ).spec
    options = TrainerOptions.of(spec, {})
    assert (options.compute_dtype, options.rollout_dtype) == (torch.float32, torch.float16)
    assert (options.compile, options.chunk_tokens, options.reference) == (False, 64, True)
    assert options.spec.actor.token_budget == 9000


@pytest.mark.parametrize(("dtype", "tf32"), [("tf32", True), ("float32", False), ("bfloat16", False), ("auto", False)])
def test_float32_is_exact_unless_tf32_is_asked_for_by_name(tmp_path: Path, dtype: str, tf32: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not tf32
    options = options_for(save_tiny_model(tmp_path), model={"dtype": dtype})
    TrainerEngine(options, single_rank()).close()
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert options.compute_dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def test_a_process_learns_its_place_from_the_environment() -> None:
    environment = {
        "GRPO_COORDINATOR_URL": "http://c:1",
        "GRPO_ADVERTISED_HOST": "10.0.0.7",
        "GRPO_LISTEN_HOST": "0.0.0.0",
        "GRPO_MEMBER_NAME": "trainer-3",
    }
    options = TrainerOptions.of(job().spec, environment)
    assert (options.coordinator_url, options.advertised_host, options.host) == ("http://c:1", "10.0.0.7", "0.0.0.0")
    assert options.name == "trainer-3"


FAILURES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemory", 84, "ppoMaxTokenLenPerGPU"),
    (MemoryError(), "OutOfMemory", 84, "enableGradientCheckpointing"),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "OutOfMemory",
        84,
        "paramOffload",
    ),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "OutOfMemory",
        84,
        "paramOffload",
    ),
    (
        RuntimeError("NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'"),
        "OutOfMemory",
        84,
        "gpuMemoryUtilization",
    ),
    (torch.distributed.DistBackendError("NCCL error in: x.cpp, unhandled cuda error"), "DeviceFailed", 85, "NCCL"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "DeviceFailed", 85, "rank 3, update"),
    (RuntimeError("[/gloo/pair.cc:525] Connection closed by peer [127.0.0.1]:1"), "RankLost", 75, "another rank"),
    (DataError("batch: wrong"), "InvalidData", 65, "batch: wrong"),
    (ZeroDivisionError("division by zero"), "InternalError", 70, "ZeroDivisionError"),
]


@pytest.mark.parametrize(("exception", "reason", "code", "words"), FAILURES)
def test_every_exception_has_a_reason_and_a_code(exception: Exception, reason: str, code: int, words: str) -> None:
    error = remote_error(exception, "update", 3)
    assert (error.reason, error.exit_code, error.recoverable) == (reason, code, False)
    assert words in error.message


def test_a_refused_operation_is_recoverable() -> None:
    error = remote_error(OperationRefused(StalledError("a reader is stuck")), "publish", 0)
    assert error.recoverable and error.message == "a reader is stuck"
