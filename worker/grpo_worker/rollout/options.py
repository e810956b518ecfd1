"""What the engine is started with, and what its start-up failures mean to a person.

Invariant: pure; no vLLM here. Every start-up error that a field of the job can cure names that field.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_worker.errors import ConfigError, DataError, DeviceError, GRPOError


@dataclass(frozen=True)
class EngineOptions:
    """Arguments of one engine (vLLM's names; units in the names)."""

    model_path: str  # directory in Hugging Face format, or a Hugging Face id
    max_model_len: int  # tokens, prompt and response
    revision: str | None = None
    dtype: str = "auto"  # auto: bfloat16 on GPU, float32 on CPU
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.6
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enforce_eager: bool | None = None  # None: on CPU only
    enable_prefix_caching: bool = True
    seed: int = 1
    cpu_kv_cache_gib: int = 1
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = True
    engine_args: dict[str, Any] = field(default_factory=dict)  # passed through to vLLM, after all of the above
    pull_streams: int = 4
    socket_timeout_seconds: float = 60.0
    token: str = ""  # of the weight server


def resolve_model(path: str, revision: str | None) -> Path:
    """The local directory of a model; a Hugging Face id is looked up in the cache and downloaded when it is not there.

    Raises:
        DataError: no such directory, or the hub does not give it.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").exists():
            raise DataError(f"model.path: {local} has no config.json. Give a model directory in Hugging Face format.")
        return local.resolve()
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise DataError(
            f"model.path: {path} is not a directory. Give a model directory in Hugging Face format, or a Hugging Face id."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"model.path: '{path}' is neither a directory nor a model that the Hugging Face hub gives us ({error})"
        ) from error


_MEMORY = re.compile(
    r"larger than the available KV cache|No available memory for the cache blocks|less than desired GPU memory utilization"
    r"|out of memory|[Cc]annot allocate memory|not enough memory"
)
_DEVICE = re.compile(r"CUDA error|NCCL|cudaError|uncorrectable ECC|Xid")
_RAISED = re.compile(r"(?:^|\s)(?:[\w.]+)?(?:Error|Exception): (?P<message>.+)$", re.MULTILINE)


def startup_error(error: BaseException, engine_log: str, options: EngineOptions, on_gpu: bool) -> GRPOError:
    """The engine did not start: say why in vLLM's words (its worker processes only log the cause) and what to
    change."""
    messages = [match["message"].strip() for match in _RAISED.finditer(engine_log)] + [str(error)]
    if memory := next((message for message in messages if _MEMORY.search(message)), None):
        raise_what = (
            f"rollout.gpuMemoryUtilization (now {options.gpu_memory_utilization})" if on_gpu
            else f"rollout.cpuKVCacheGiB (now {options.cpu_kv_cache_gib})"
        )  # fmt: skip
        return ConfigError(
            f"rollout: the engine has too little memory for its KV cache. vLLM: {memory} "
            f"Raise {raise_what}, or lower data.maxPromptLength and data.maxResponseLength (the engine's context is their sum, "
            f"{options.max_model_len} tokens)."
        )
    if device := next((message for message in messages if _DEVICE.search(message)), None):
        return DeviceError(f"rollout: the engine did not start. vLLM: {device}")
    return ConfigError(f"rollout: the engine did not start with {options.model_path}. vLLM: {messages[0]}")


def engine_environment(options: EngineOptions, on_gpu: bool, log_config: Path) -> dict[str, str]:
    """Variables that vLLM reads when it is imported and in its worker processes."""
    variables = {
        "VLLM_LOGGING_CONFIG_PATH": str(log_config),  # its own default would put handlers and colours on our stderr
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is on disk by now
    }
    if on_gpu:
        variables["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # CUDA does not survive a fork, and we have looked at it
    else:
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kv_cache_gib)
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the trainer may share these cores; OMP_NUM_THREADS decides
        if options.tensor_parallel_size == 1:
            # The worker lives in the engine's process: one start-up of imports less.
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return variables


def log_configuration(log_file: Path) -> dict[str, Any]:
    """`logging.config` of vLLM's logger: errors to stderr (VLLM_LOGGING_LEVEL shows more) and to a file that
    `startup_error` reads."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "level": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
                "formatter": "plain",
                "stream": "ext://sys.stderr",
            },
            "file": {"class": "logging.FileHandler", "level": "ERROR", "formatter": "plain", "filename": str(log_file)},
        },
        "loggers": {
            "vllm": {
                "level": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
                "handlers": ["stderr", "file"],
                "propagate": False,
            }
        },
    }
