"""What the engine is started with, and what its start-up failures mean to a person.

Invariant: pure; no vLLM here. Every start-up error that a field of the job can cure names that field.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_worker.config.actor import Model
from grpo_worker.config.job import Spec
from grpo_worker.config.rollout import Rollout
from grpo_worker.config.run import Network
from grpo_worker.errors import ConfigError, DeviceError, GRPOError, MemoryFullError, memory_was_full
from grpo_worker.memory_plan import checked_plan

BACKEND = "grpo_store"  # the weight transport that the plug-in registers
WORKER_EXTENSION = "grpo_worker.rollout.plugin.WorkerExtension"


@dataclass(frozen=True)
class EngineOptions:
    """One engine: the document's sections, and what no section holds."""

    model: Model
    rollout: Rollout
    max_model_len: int  # tokens of one sequence, prompt and response
    network: Network = field(default_factory=Network)
    token: str = ""  # of the weight server
    job: Spec | None = None  # of a colocated engine: what has its devices in turn with it

    @property
    def colocated(self) -> bool:
        return self.job is not None

    def kv_cache_bytes(self, directory: Path, device_bytes: int) -> int | None:
        """Of a colocated engine, on each of its devices. Raises ConfigError when the job does not fit."""
        plan = checked_plan(self.job, directory, device_bytes) if self.job else None
        return plan.kv_cache_bytes if plan else None


def engine_arguments(
    options: EngineOptions, directory: Path, on_gpu: bool, kv_cache_bytes: int | None = None
) -> dict[str, Any]:
    """What vLLM's engine is made with: `rollout.engineArgs`, but for what the run sets itself (`config.rollout.OWN_ENGINE_ARGS`).

    `kv_cache_bytes`: of a colocated engine. vLLM would measure what is left, and take what the trainer allocates meanwhile for its own.
    """
    rollout = options.rollout
    dtype = ("bfloat16" if on_gpu else "float32") if rollout.dtype == "auto" else rollout.dtype
    own: dict[str, Any] = {
        "model": str(directory),
        "dtype": dtype,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "max_model_len": options.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": not on_gpu if rollout.enforce_eager is None else rollout.enforce_eager,
        "enable_prefix_caching": rollout.enable_prefix_caching,
        "seed": rollout.seed,
        "skip_tokenizer_init": True,
        # The trainer's log-probs are of the whole vocabulary at the run's temperature. Raw ones are of the whole vocabulary at
        # temperature 1, whatever top-p and top-k cut off; processed ones are after temperature and cut.
        "logprobs_mode": "raw_logprobs" if rollout.temperature == 1 else "processed_logprobs",
        "weight_transfer_config": {"backend": BACKEND},
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_sleep_mode": options.colocated
        and on_gpu,  # on CPU there is no memory to give back, and vLLM refuses it
    }
    if rollout.max_num_batched_tokens is not None:
        own["max_num_batched_tokens"] = rollout.max_num_batched_tokens
    usual: dict[str, Any] = {"use_tqdm_on_load": False}
    if kv_cache_bytes is not None:
        usual["kv_cache_memory_bytes"] = kv_cache_bytes
    if not on_gpu:
        usual["block_size"] = 32  # vLLM's 128 on CPU never shares a short prompt
    return usual | rollout.engine_args | own


_KV_CACHE = "larger than the available KV cache"
_DEVICE = re.compile(r"CUDA error|NCCL|cudaError|uncorrectable ECC|Xid")
_RAISED = re.compile(r"(?:^|\s)(?:[\w.]+)?(?:Error|Exception): (?P<message>.+)$", re.MULTILINE)


def startup_error(error: BaseException, engine_log: str, options: EngineOptions, on_gpu: bool) -> GRPOError:
    """The engine did not start: say why in vLLM's words (its worker processes only log the cause) and what to
    change."""
    messages = [match["message"].strip() for match in _RAISED.finditer(engine_log)] + [str(error)]
    if memory := next((message for message in messages if _KV_CACHE in message or memory_was_full(message)), None):
        on_cpu = f"rollout.cpuKVCacheGiB (now {options.rollout.cpu_kv_cache_gib})"
        raise_what = (
            f"rollout.gpuMemoryUtilization (now {options.rollout.gpu_memory_utilization})" if on_gpu else on_cpu
        )
        # What a GPU has left depends on who else holds memory at that moment; on CPU the document says how much there is.
        kind = ConfigError if _KV_CACHE in memory and not on_gpu else MemoryFullError
        return kind(
            f"rollout: the engine has too little memory. vLLM: {memory} Raise {raise_what}, or lower data.maxPromptLength and "
            f"data.maxResponseLength (the engine's context is their sum, {options.max_model_len} tokens); where a trainer shares the "
            "device, actor.fsdp.paramOffload and optimizerOffload leave more."
        )
    if device := next((message for message in messages if _DEVICE.search(message)), None):
        return DeviceError(f"rollout: the engine did not start. vLLM: {device}")
    return ConfigError(f"rollout: the engine did not start with {options.model.path}. vLLM: {messages[0]}")


def engine_environment(options: EngineOptions, on_gpu: bool, log_config: Path) -> dict[str, str]:
    """Variables that vLLM reads when it is imported and in its worker processes."""
    variables = {
        "VLLM_LOGGING_CONFIG_PATH": str(log_config),  # its own default would put handlers and colours on our stderr
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is on disk by now
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is stepped here; only workers of tensor parallelism are processes
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # neither CUDA nor our threads survive a fork
    }
    if not on_gpu:
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(options.rollout.cpu_kv_cache_gib)
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the trainer may share these cores; OMP_NUM_THREADS decides
    return variables


def log_configuration(log_file: Path) -> dict[str, Any]:
    """`logging.config` of vLLM's logger: errors to stderr (VLLM_LOGGING_LEVEL shows more) and to a file that
    `startup_error` reads."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "plain": {"format": "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"},
            "ours": {"()": "grpo_worker.logs.Formatter"},
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "level": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
                "formatter": "ours",
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
