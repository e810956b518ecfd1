"""From a job to the trainer's options, and from exceptions to exit codes."""

from typing import Any

import pytest
import torch

from grpo_worker.config.job import GRPOJob
from grpo_worker.errors import ConfigError, DataError, StalledError
from grpo_worker.trainer.failures import OperationRefused, remote_error
from grpo_worker.trainer.main import options_of


def job(**spec: Any) -> GRPOJob:
    document = {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {"name": "small"},
        "spec": {"model": {"path": "/models/tiny"}, "data": {"trainFiles": ["train.parquet"]}, **spec},
    }
    return GRPOJob.model_validate(document)


def test_defaults_of_a_job_reach_the_trainer() -> None:
    options = options_of(job(), {}, "cpu")
    assert options.model_path == "/models/tiny"
    assert (options.compute_dtype, options.compile, options.chunk_tokens) == ("float32", False, 1024)
    assert (options.max_token_len_per_gpu, options.micro_batch_size_per_gpu) == (16384, None)
    assert options.host == options.advertised_host == "127.0.0.1"
    assert not options.reference
    on_gpu = options_of(job(), {}, "cuda")
    assert (on_gpu.compute_dtype, on_gpu.compile, on_gpu.chunk_tokens) == ("bfloat16", True, 4096)


def test_fields_of_a_job_reach_the_trainer() -> None:
    spec = job(
        actor={
            "useKLLoss": True,
            "klLossCoef": 0.5,
            "ppoMaxTokenLenPerGPU": 9000,
            "ppoEpochs": 2,
            "ppoMiniBatchSize": 256,
            "fsdp": {"optimizerOffload": True},
            "optim": {"lr": 3e-6, "lrScheduler": "cosine", "lrWarmupSteps": 4, "clipGrad": 0.5},
        },
        trainer={"totalSteps": 10},
        rollout={"temperature": 0.7},
    )
    environment = {
        "GRPO_COORDINATOR_URL": "http://c:1",
        "GRPO_ADVERTISED_HOST": "10.0.0.7",
        "GRPO_LISTEN_HOST": "0.0.0.0",
    }
    options = options_of(spec, environment, "cpu")
    assert options.reference and options.optimizer_offload and options.temperature == 0.7
    assert options.loss.kl_loss_coef == 0.5 and options.max_token_len_per_gpu == 9000
    assert options.schedule_of(10).total_updates == 10 * 4 * 2
    assert (options.optimizer.lr, options.optimizer.warmup_updates, options.optimizer.grad_clip) == (3e-6, 4, 0.5)
    assert (options.coordinator_url, options.advertised_host, options.host) == ("http://c:1", "10.0.0.7", "0.0.0.0")


FAILURES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemory", 78, "ppoMaxTokenLenPerGPU"),
    (MemoryError(), "OutOfMemory", 78, "enableGradientCheckpointing"),
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


def test_a_run_that_is_all_warm_up_names_the_field() -> None:
    options = options_of(job(actor={"optim": {"lrScheduler": "linear", "lrWarmupSteps": 80}}), {}, "cpu")
    assert options.schedule_of(1000).total_updates == 1000 * options.updates_per_step
    with pytest.raises(ConfigError, match=r"actor\.optim\.lrWarmupSteps"):
        options.schedule_of(1)


def test_the_reference_has_limits_of_its_own() -> None:
    options = options_of(
        job(ref={"logProbMicroBatchSizePerGPU": 3}, rollout={"logProbMaxTokenLenPerGPU": 500}), {}, "cpu"
    )
    reference = options.for_reference()
    assert (options.log_prob_micro_batch_size_per_gpu, options.log_prob_max_token_len_per_gpu) == (None, 500)
    assert (reference.log_prob_micro_batch_size_per_gpu, reference.log_prob_max_token_len_per_gpu) == (3, None)
