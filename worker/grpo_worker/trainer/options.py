"""What the trainer needs to know of a job, in its own words.

Invariant: frozen, and equal on all ranks of a run; everything that changes during a run arrives in messages.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from grpo_worker.config.actor import check_decay

DtypeName = Literal["bfloat16", "float16", "float32"]
DEFAULT_CHUNK_TOKENS = {"cuda": 4096, "cpu": 1024}


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW (arXiv 1711.05101) with a learning rate that is a function of the step number alone."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # not applied to norms and biases (parameters of one dimension)
    grad_clip: float = 1.0  # global L2 norm; 0 turns clipping off
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_updates: int = 0
    total_updates: int = (
        0  # optimizer steps of the whole run; 0: not known yet (the coordinator tells with each update)
    )
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_decay(self.schedule, self.warmup_updates, self.total_updates)


@dataclass(frozen=True)
class LossOptions:
    """Which loss the update minimises; the names are verl's."""

    loss_mode: str = "vanilla"  # or `module:function`
    loss_agg_mode: str = "token-mean"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    entropy_coeff: float = 0.0


@dataclass(frozen=True)
class TrainerOptions:
    """One trainer process group: `nodes` x `gpus_per_node` ranks."""

    model_path: str
    model_revision: str | None = None
    device: Literal["cuda", "cpu"] = "cpu"
    dtype: DtypeName | None = None  # of the computation; None: bfloat16 on CUDA, float32 on CPU. Masters are float32
    seed: int = 0
    temperature: float = 1.0  # sampling temperature: the logits are divided by it

    max_prompt_tokens: int = 512
    max_response_tokens: int = 1024

    use_remove_padding: bool = True
    gradient_checkpointing: bool = True
    compile_layers: bool | None = None  # None: on CUDA only
    param_offload: bool = False
    optimizer_offload: bool = False
    head_chunk_tokens: int | None = None  # tokens whose logits exist at a time; None: 4096 on CUDA, 1024 on CPU

    reference: bool = False  # build the reference model: KL in the loss or in the reward
    ref_param_offload: bool = False

    max_token_len_per_gpu: int = 16384  # token budget of a micro-batch
    micro_batch_size_per_gpu: int | None = None  # sequences of a micro-batch, in place of the budget
    log_prob_max_token_len_per_gpu: int | None = None  # None: the same as the update's
    log_prob_micro_batch_size_per_gpu: int | None = None
    ref_log_prob_max_token_len_per_gpu: int | None = None  # of the reference model; None: the same as the update's
    ref_log_prob_micro_batch_size_per_gpu: int | None = None
    ppo_epochs: int = 1
    updates_per_step: int = 1  # optimizer steps of a full training step

    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    loss: LossOptions = field(default_factory=LossOptions)

    rollout_dtype: DtypeName | None = None  # None: the compute dtype
    save_dtype: DtypeName | None = None  # None: the compute dtype

    host: str = "127.0.0.1"  # address that the RPC server and the weight server listen on
    port: int = 0
    advertised_host: str = "127.0.0.1"  # address that the others reach this process by
    weight_port: int = 0
    coordinator_url: str = ""
    name: str = "trainer-0"
    heartbeat_seconds: float = 5.0
    coordinator_timeout_seconds: float = 300.0  # without an answer for so long the process ends with exit code 75
    rendezvous_timeout_seconds: float = 600.0  # until all ranks have come
    collective_timeout_seconds: float = 1800.0
    operation_timeout_seconds: float = 3600.0

    def schedule_of(self, total_steps: int) -> OptimizerOptions:
        """The optimizer's options for a run of `total_steps` (0: unknown). Raises ConfigError when they do not fit."""
        return replace(self.optimizer, total_updates=total_steps * self.updates_per_step)

    def for_reference(self) -> "TrainerOptions":
        """The same options with the reference model's limits for log-probs."""
        return replace(
            self,
            log_prob_max_token_len_per_gpu=self.ref_log_prob_max_token_len_per_gpu,
            log_prob_micro_batch_size_per_gpu=self.ref_log_prob_micro_batch_size_per_gpu,
        )

    @property
    def max_sequence_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def compile(self) -> bool:
        return self.device == "cuda" if self.compile_layers is None else self.compile_layers

    @property
    def chunk_tokens(self) -> int:
        return self.head_chunk_tokens or DEFAULT_CHUNK_TOKENS[self.device]

    @property
    def compute_dtype(self) -> DtypeName:
        return self.dtype or ("bfloat16" if self.device == "cuda" else "float32")
