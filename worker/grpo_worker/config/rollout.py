"""`spec.rollout`: the vLLM engines and how far they may run ahead of the trainer."""

from typing import Any, Literal

from grpo_worker.config.base import LARGEST_SEED, FunctionPath, Section, field

# vLLM lifts a lower temperature to this one, and the trainer would divide by another.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0
MOST_SAMPLES = 4096

# Engine arguments that the run sets itself: their type in vLLM, and the field to use instead ("" where there is none).
OWN_ENGINE_ARGS: dict[str, tuple[str, str]] = {
    "model": ("string", "model.path"),
    "dtype": ("string", "rollout.dtype"),
    "seed": ("integer", "rollout.seed"),
    "max_model_len": ("integer", "rollout.maxModelLen"),
    "max_num_seqs": ("integer", "rollout.maxNumSeqs"),
    "max_num_batched_tokens": ("integer", "rollout.maxNumBatchedTokens"),
    "gpu_memory_utilization": ("number", "rollout.gpuMemoryUtilization"),
    "enforce_eager": ("boolean", "rollout.enforceEager"),
    "enable_prefix_caching": ("boolean", "rollout.enablePrefixCaching"),
    "tensor_parallel_size": ("integer", "rollout.tensorParallelSize"),
    "pipeline_parallel_size": ("integer", "rollout.tensorParallelSize"),
    "data_parallel_size": ("integer", "rollout.replicas"),
    "logprobs_mode": ("string", ""),
    "skip_tokenizer_init": ("boolean", ""),
    "weight_transfer_config": ("object", ""),
    "enable_sleep_mode": ("boolean", "placement"),
    "worker_extension_cls": ("string", ""),
}


def instead_of_engine_arg(name: str) -> str:
    """What to do without one of OWN_ENGINE_ARGS."""
    field_name = OWN_ENGINE_ARGS[name][1]
    return f"use {field_name}" if field_name else "the run depends on its own"


class ValidationSampling(Section):
    """Sampling on the validation files. Greedy pass@1 is always measured; mean@k beside it when n > 1."""

    n: int = field(
        1,
        "Samples a prompt for mean@k; 1 measures the greedy answer alone.",
        verl="rollout.val_kwargs.n",
        unit="samples",
        ge=1,
        le=MOST_SAMPLES,
    )
    temperature: float = field(
        1.0,
        "Temperature of the sampled answers.",
        verl="rollout.val_kwargs.temperature",
        ge=LOWEST_TEMPERATURE,
        le=HIGHEST_TEMPERATURE,
    )
    top_p: float = field(1.0, "Nucleus of the sampled answers.", verl="rollout.val_kwargs.top_p", gt=0, le=1)
    max_prompts: int | None = field(None, "Only the first so many validation prompts.", unit="prompts", ge=1)


class Rollout(Section):
    """Generation."""

    n: int = field(5, "Samples a prompt.", verl="rollout.n", unit="samples", ge=1, le=MOST_SAMPLES)
    temperature: float = field(
        1.0, "Sampling temperature; the trainer divides its logits by it.", verl="rollout.temperature",
        ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE,
    )  # fmt: skip
    top_p: float = field(1.0, "Nucleus.", verl="rollout.top_p", gt=0, le=1)
    top_k: int = field(-1, "Largest rank that is sampled; -1 is all.", verl="rollout.top_k", ge=-1)
    min_p: float = field(0.0, "Least probability that is sampled, as a share of the likeliest token's.", ge=0, le=1)
    stop: list[str] = field(
        list,
        "Texts that end a response beside the end-of-sequence tokens, each one token of the tokenizer, e.g. </answer>.",
    )
    stop_token_ids: list[int] = field(list, "The same as token ids.")
    replicas: int = field(
        1, "Engines; `kubectl scale` changes them on a running job.", unit="engines", ge=1, le=1000, immutable=False
    )
    min_replicas: int | None = field(
        None,
        "Engines that must serve current weights before a run starts or goes on after a restart; default all of them.",
        unit="engines",
        ge=1,
        immutable=False,
    )
    max_replicas: int | None = field(
        None, "Most engines that replicas, and so an autoscaler, may ask for; default no limit.",
        unit="engines", ge=1, immutable=False, cluster=True,
    )  # fmt: skip
    tensor_parallel_size: int = field(
        1, "GPUs of one engine.", verl="rollout.tensor_model_parallel_size", unit="GPUs", ge=1, le=128
    )
    gpu_memory_utilization: float = field(
        0.6, "Share of the GPU's memory that the engine takes.", verl="rollout.gpu_memory_utilization", gt=0, lt=1
    )
    max_staleness: int = field(
        0, "Policy versions that a sample may lag behind the update that trains on it. 0: generate, then train; 1 and more overlap them.",
        verl="async_training.staleness_threshold", unit="versions", ge=0, le=1000,
    )  # fmt: skip
    log_prob_micro_batch_size_per_gpu: int | None = field(
        None, "Sequences a forward pass when old log-probs are computed; in place of the token budget.",
        verl="rollout.log_prob_micro_batch_size_per_gpu", unit="sequences", ge=1,
    )  # fmt: skip
    log_prob_max_token_len_per_gpu: int | None = field(
        None,
        "Token budget of that pass; default actor.ppoMaxTokenLenPerGPU.",
        verl="rollout.log_prob_max_token_len_per_gpu",
        unit="tokens",
        ge=1,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        "auto", "Type of the engine's weights; auto is bfloat16 on GPU, float32 on CPU.", verl="rollout.dtype"
    )
    max_num_seqs: int = field(
        256, "Sequences that one engine runs at a time.", verl="rollout.max_num_seqs", unit="sequences", ge=1
    )
    max_num_batched_tokens: int | None = field(
        None, "Tokens of one engine step; default vLLM's.", verl="rollout.max_num_batched_tokens", unit="tokens", ge=1
    )
    enforce_eager: bool | None = field(None, "No CUDA graphs; default on CPU only.", verl="rollout.enforce_eager")
    enable_prefix_caching: bool = field(
        True, "Samples of a group share the prompt's KV cache.", verl="rollout.enable_prefix_caching"
    )
    keep_kv_cache: bool = field(
        True,
        "With maxStaleness of 1 and more, requests that run while weights are swapped go on with the KV cache that the old weights made; "
        "false computes it again with the new ones.",
    )
    log_probs: Literal["auto", "all"] = field(
        "auto",
        "Samples that the engine returns log-probs of. all: every one. auto: every one where the update reads them (rolloutIs, rolloutRs, "
        "bypassMode), else those of one prompt in eight, for the metrics of the mismatch. Agents' are always returned, validation's never.",
    )
    cpu_kv_cache_gib: int = field(1, "KV cache of an engine on CPU.", unit="GiB", ge=1, le=65536)
    max_model_len: int | None = field(
        None,
        "Tokens of a sequence that an engine holds, for agents of several turns; default maxPromptLength and maxResponseLength together.",
        verl="rollout.max_model_len",
        unit="tokens",
        ge=1,
    )
    engine_args: dict[str, Any] = field(
        dict, "Further vLLM engine arguments, passed through.", verl="rollout.engine_kwargs.vllm"
    )
    seed: int = field(1, "Seed of the sampling.", verl="rollout.seed", ge=0, le=LARGEST_SEED)
    seed_per_request: bool = field(
        True,
        "Each sample has its own generator, so results do not depend on batching; false is faster on GPU and not reproducible.",
    )
    request_timeout_seconds: float = field(
        600.0, "Deadline of a prompt's generation, from when an engine can run it.", unit="seconds", gt=0
    )
    max_attempts: int = field(
        3,
        "Times that an engine fails on a prompt, or that it is late alone, before it has failed; lost engines do not count.",
        ge=1,
        le=1000,
    )
    agent: FunctionPath | None = field(
        None,
        "Async function that makes one sample in turns (tools, environments), as module:function or path/to/file.py:function; "
        "default one turn.",
        verl="rollout.agent.default_agent_loop",
    )
    agent_options: dict[str, Any] = field(dict, "Keyword arguments of the agent.")
    validation: ValidationSampling = field(
        ValidationSampling, "Sampling on the validation files.", verl="rollout.val_kwargs"
    )

    @property
    def clears_kv_cache(self) -> bool:
        """At every swap. Without staleness nothing runs then that would lose by it."""
        return self.max_staleness == 0 or not self.keep_kv_cache

    @property
    def cuts(self) -> bool:
        """Whether tokens of the vocabulary are never sampled."""
        return self.top_p != 1 or self.top_k != -1 or self.min_p != 0

    def context_tokens(self, prompt_tokens: int, response_tokens: int) -> int:
        """Tokens that an engine holds of one sequence."""
        return self.max_model_len or prompt_tokens + response_tokens
