"""`spec.model`, `spec.actor`, `spec.ref`: the policy that learns and the reference that it is held to."""

from typing import Literal

from grpo_worker.config.algorithm import KLKind
from grpo_worker.config.base import Decay, Section, field
from grpo_worker.errors import ConfigError

DEFAULT_TOKEN_BUDGET = 16384
LossAggMode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def check_decay(scheduler: str, warmup_updates: int, total_updates: int) -> None:
    """Raises ConfigError when a run of `total_updates` (0: not known) ends before its learning rate can decay."""
    if scheduler != "constant" and 0 < total_updates <= warmup_updates:
        raise ConfigError(
            f"actor.optim.lrScheduler: {scheduler} decays over the run's updates after the warm-up, and there are "
            f"{total_updates} updates and {warmup_updates} of warm-up. Shorten actor.optim.lrWarmupSteps, or use constant."
        )


class Model(Section):
    """The model that both sides start from."""

    path: str = field(
        ..., "Directory, path on a volume, or Hugging Face id.", verl="actor_rollout_ref.model.path", min_length=1
    )
    revision: str | None = field(None, "Branch, tag or commit of a Hugging Face id.")
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = field(
        "auto",
        "Compute type of the trainer; auto is bfloat16 on GPU, float32 on CPU. tf32 is float32 whose matrix products a GPU "
        "rounds to 10 bits (TensorFloat-32). Master weights are always float32.",
        verl="actor.fsdp_config.dtype",
    )  # fmt: skip
    use_remove_padding: bool = field(
        True, "Pack sequences without padding.", verl="actor_rollout_ref.model.use_remove_padding"
    )
    enable_gradient_checkpointing: bool = field(
        True,
        "Recompute each layer's activations in the backward pass.",
        verl="actor_rollout_ref.model.enable_gradient_checkpointing",
    )
    gradient_checkpointing: Literal["full", "selective"] = field(
        "full",
        "What is recomputed. full: whole layers, a third more work. selective: all but the results of matrix products and attention, "
        "which are kept: next to no more work, and more memory.",
    )
    compile: bool | None = field(None, "torch.compile the layers; default on GPU only.", verl="actor.use_torch_compile")
    head_chunk_size: int | None = field(
        None,
        "Tokens whose logits exist at a time; default 4096 on GPU, 1024 on CPU. "
        "From the size of a micro-batch on, logits are computed once and kept for the backward pass.",
        verl="actor.entropy_from_logits_chunk_size",
        unit="tokens",
        ge=1,
    )


class Optim(Section):
    """AdamW and its schedule."""

    lr: float = field(1e-6, "Peak learning rate.", verl="actor.optim.lr", ge=0, le=1)
    lr_scheduler: Literal["constant", "cosine", "linear"] = field(
        "constant", "Shape after the warm-up.", verl="actor.optim.lr_scheduler_type"
    )
    lr_warmup_steps: int = field(0, "Linear warm-up from 0.", verl="actor.optim.lr_warmup_steps", unit="updates", ge=0)
    min_lr_ratio: float = field(
        0.0, "Last learning rate as a share of lr (cosine, linear).", verl="actor.optim.min_lr_ratio", ge=0, le=1
    )
    weight_decay: float = field(
        0.01, "Decoupled weight decay; not on norms and biases.", verl="actor.optim.weight_decay", ge=0, le=1
    )
    betas: list[Decay] = field(
        lambda: [0.9, 0.999], "AdamW's moments.", verl="actor.optim.betas", min_length=2, max_length=2
    )
    eps: float = field(1e-8, "AdamW's epsilon.", gt=0, le=1)
    clip_grad: float = field(1.0, "Largest global gradient norm.", verl="actor.grad_clip", gt=0)


class ActorFSDP(Section):
    """How the actor is sharded, and where its shards live."""

    shard_size: int = field(
        -1,
        "Neighbouring ranks that one copy of the models is cut over; groups of so many hold copies (HSDP). -1: all ranks. With "
        "trainer.gpusPerNode only gradients travel between nodes.",
        verl="actor.fsdp_config.fsdp_size",
        unit="ranks",
        ge=-1,
    )
    gradient_reduction: Literal["auto", "microBatch", "update"] = field(
        "auto",
        "When gradients are summed over ranks. microBatch: after each. update: after an update's last, which needs 4 bytes a parameter "
        "on each rank for whole gradients. auto: what needs no more memory: between copies of the model, and on a rank that holds a "
        "whole one (not with paramOffload), after the last; within a copy after each.",
    )
    param_offload: bool = field(
        False, "Keep parameters and gradients in host memory between uses.", verl="actor.fsdp_config.param_offload"
    )
    optimizer_offload: bool = field(
        False, "Keep optimizer states in host memory between updates.", verl="actor.fsdp_config.optimizer_offload"
    )


class Actor(Section):
    """The update."""

    optim: Optim = field(Optim, "Optimizer.", verl="actor.optim")
    ppo_mini_batch_size: int = field(
        256,
        "Prompts an optimizer step; divides data.trainBatchSize.",
        verl="actor.ppo_mini_batch_size",
        unit="prompts",
        ge=1,
    )
    ppo_epochs: int = field(1, "Passes over each batch.", verl="actor.ppo_epochs", ge=1, le=1000)
    ppo_micro_batch_size_per_gpu: int | None = field(
        None,
        "Sequences a forward pass; in place of the token budget.",
        verl="actor.ppo_micro_batch_size_per_gpu",
        unit="sequences",
        ge=1,
    )
    ppo_max_token_len_per_gpu: int | None = field(
        None,
        f"Token budget of a forward pass (dynamic batch size); default {DEFAULT_TOKEN_BUDGET}.",
        verl="actor.ppo_max_token_len_per_gpu",
        unit="tokens",
        ge=1,
    )
    clip_ratio_low: float = field(
        0.2, "Ratio is clipped below at 1 - this; 1 leaves it open.", verl="actor.clip_ratio_low", ge=0, le=1
    )
    clip_ratio_high: float = field(0.2, "Ratio is clipped above at 1 + this.", verl="actor.clip_ratio_high", ge=0)
    clip_ratio_c: float = field(
        3.0, "Dual clip: bound of the loss for negative advantages (arXiv 1912.09729).", verl="actor.clip_ratio_c", gt=1
    )
    loss_agg_mode: LossAggMode = field("token-mean", "How token losses become one number.", verl="actor.loss_agg_mode")
    loss_mode: str = field(
        "vanilla", "vanilla, gspo, cispo, or module:function.", verl="actor.policy_loss.loss_mode",
        pattern=r"^(vanilla|gspo|cispo|[\w./\-]+:[A-Za-z_]\w*)$",
    )  # fmt: skip
    use_kl_loss: bool = field(
        False, "Add klLossCoef times the KL to the reference model to the loss.", verl="actor.use_kl_loss"
    )
    kl_loss_coef: float = field(0.001, "Coefficient of that term.", verl="actor.kl_loss_coef", ge=0)
    kl_loss_type: KLKind = field(
        "low_var_kl",
        "Estimator of that term; a trailing + takes k2's gradient, which is unbiased.",
        verl="actor.kl_loss_type",
    )
    entropy_coeff: float = field(0.0, "Coefficient of the entropy bonus.", verl="actor.entropy_coeff", ge=0)
    recompute_old_log_probs: Literal["auto", "always"] = field(
        "auto",
        "auto: no forward pass before the update where a step is one update, whose own forward is that of the old policy "
        "(not with rolloutRs, rolloutIsBatchNormalize or useKLInReward); always: as verl does.",
    )
    share_prompts: bool = field(
        False,
        "Compute a prompt once for all of its sequences in a micro-batch, which then hold a prompt's sequences together. It pays where prompts "
        "are long beside responses. Where micro-batches are counted in tokens (ppoMaxTokenLenPerGPU).",
        verl="actor.use_prefix_grouper",
    )
    fsdp: ActorFSDP = field(ActorFSDP, "Sharding and offload.", verl="actor.fsdp_config")

    @property
    def token_budget(self) -> int:
        """Tokens of a forward pass."""
        return self.ppo_max_token_len_per_gpu or DEFAULT_TOKEN_BUDGET

    def updates_per_step(self, train_batch_size: int) -> int:
        """Optimizer steps that a full training step makes."""
        return -(-train_batch_size // self.ppo_mini_batch_size) * self.ppo_epochs


class RefFSDP(Section):
    """Where the reference model's shards live."""

    param_offload: bool = field(
        False, "Keep the reference model in host memory between uses.", verl="ref.fsdp_config.param_offload"
    )


class Ref(Section):
    """The reference model; loaded only when a KL term asks for it."""

    log_prob_micro_batch_size_per_gpu: int | None = field(
        None,
        "Sequences a forward pass; in place of the token budget.",
        verl="ref.log_prob_micro_batch_size_per_gpu",
        unit="sequences",
        ge=1,
    )
    log_prob_max_token_len_per_gpu: int | None = field(
        None,
        "Token budget of a forward pass; default actor.ppoMaxTokenLenPerGPU.",
        verl="ref.log_prob_max_token_len_per_gpu",
        unit="tokens",
        ge=1,
    )
    fsdp: RefFSDP = field(RefFSDP, "Offload.", verl="ref.fsdp_config")
