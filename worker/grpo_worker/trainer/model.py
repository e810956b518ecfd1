"""The policy: a Hugging Face causal LM, sharded by FSDP2, that turns packed tokens into log-probs.

Invariants: master weights are float32 and sharded, compute runs in the compute dtype, gradients are *summed* over
ranks in float32 (the loss is already divided by global counts). Dropout is off: the ratio compares log-probs of one
function. The LM head runs inside `forward`, where FSDP has gathered it. Parameter names, less the wrapper's prefix,
are the checkpoint's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from grpo_worker.errors import ConfigError, DataError, one_line
from grpo_worker.trainer import attention
from grpo_worker.trainer.batch import MicroBatch
from grpo_worker.trainer.logprobs import EAGER, ChunkKernels, chunked_log_probs
from grpo_worker.trainer.options import TrainerOptions

PREFIX = "lm."
# A model whose logits are not hidden @ head.T cannot use our head.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "final_logit_scale")


class PolicyModel(nn.Module):
    """forward: a micro-batch in, (log-probs, entropy) of its response tokens out, float32 [response tokens]."""

    def __init__(self, lm: PreTrainedModel, packed: bool, chunk_tokens: int, kernels: ChunkKernels = EAGER) -> None:
        super().__init__()
        self.lm = lm
        self.packed = packed
        self.chunk_tokens = chunk_tokens
        self.kernels = kernels

    @property
    def layers(self) -> nn.ModuleList:
        return self.lm.model.layers

    def forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if self.packed:
            assert batch.cu_seq_lens is not None
            arguments |= attention.attention_arguments(batch.cu_seq_lens, batch.lengths)
        output = self.lm.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, return_dict=True, **arguments
        )
        hidden = output.last_hidden_state.flatten(0, 1)[batch.predict_index]
        weight = self.lm.lm_head.weight
        return chunked_log_probs(hidden, weight, batch.targets, temperature, self.chunk_tokens, self.kernels)


def set_float32_precision(tf32: bool) -> None:
    """Whether this process's float32 matrix products and convolutions may be rounded to TF32's 10 bits on a GPU.

    Exact also when the model runs in bfloat16: what it still computes in float32 (rotary angles) is so for a reason.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # PyTorch's own default is True


def load_config(path: str, revision: str | None) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: no model at {path!r}: {one_line(error)}") from error


def check_supported(config: PreTrainedConfig, options: TrainerOptions) -> None:
    """Raises ConfigError for what the packed forward or the chunked head would compute wrongly."""
    for name in LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(f"model.path: {config.model_type} changes its logits by {name}, which is not supported.")
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise ConfigError(
            f"model.path: {config.model_type} is a mixture of experts; only dense decoders are supported."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and options.max_sequence_tokens > longest:
        raise ConfigError(
            f"data.maxPromptLength + data.maxResponseLength = {options.max_sequence_tokens} is over the model's "
            f"max_position_embeddings of {longest}."
        )
    if options.spec.model.use_remove_padding:
        attention.check_packable(config, options.max_sequence_tokens)


def load_language_model(options: TrainerOptions) -> PreTrainedModel:
    """The model in the checkpoint's dtype on the CPU. Raises DataError when it is missing or not a dense decoder."""
    section = options.spec.model
    path, revision = section.path, section.revision
    config = load_config(path, revision)
    check_supported(config, options)
    implementation = attention.PACKED_ATTENTION if section.use_remove_padding else attention.PADDED_ATTENTION
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype="auto", attn_implementation=implementation, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: {path!r} does not load: {one_line(error)}") from error
    decoder, head = getattr(lm, "model", None), getattr(lm, "lm_head", None)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not isinstance(head, nn.Linear):
        raise ConfigError(f"model.path: {type(lm).__name__} is no decoder with `model.layers` and `lm_head`.")
    if head.bias is not None:
        raise ConfigError(f"model.path: {type(lm).__name__} has a bias in its LM head, which is not supported.")
    return lm.eval()


def build_policy(
    lm: PreTrainedModel,
    options: TrainerOptions,
    mesh: DeviceMesh,
    *,
    trainable: bool = True,
    param_offload: bool = False,
) -> PolicyModel:
    """Shard `lm` over `mesh`, layer by layer: at no time is more than one layer whole in float32 on the device.

    A model that is not trainable is kept in the compute dtype (it is cast to that for use anyway).
    """
    section, compute_dtype = options.spec.model, options.compute_dtype
    stored_dtype = torch.float32 if trainable else compute_dtype
    model = PolicyModel(lm, section.use_remove_padding, options.chunk_tokens, ChunkKernels(options.compile))
    model.requires_grad_(trainable)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=options.device == "cuda") if param_offload else OffloadPolicy()
    # On one rank nothing is gained by freeing the gathered parameters between forward and backward.
    reshard = mesh.size() > 1 or param_offload
    for layer in model.layers:
        layer.to(stored_dtype)
        _wrap_forward(layer, options.compile, section.enable_gradient_checkpointing and trainable)
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    model.to(stored_dtype)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    if mesh.size() > 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def _wrap_forward(layer: nn.Module, compile: bool, checkpointed: bool) -> None:
    """Compile, then checkpoint, the layer's forward. FSDP's hooks stay outside: recomputation gathers nothing again."""
    forward: Callable[..., Any] = layer.forward
    if compile:
        forward = torch.compile(forward, dynamic=True)
    if checkpointed:
        inner = forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    layer.forward = forward


def named_parameters(model: PolicyModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their checkpoint names, in layer order; a tied LM head is left out, as in the checkpoint."""
    for name, parameter in model.named_parameters():
        yield name.removeprefix(PREFIX), parameter


def gathered_parameters(model: PolicyModel, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors in `dtype`, one at a time. Collective: each rank must run it to the end, in step.

    The shard is cast before it is gathered: half the bytes travel, and casting commutes with gathering.
    """
    for name, parameter in named_parameters(model):
        tensor = parameter.detach()
        whole = tensor.to(device=device, dtype=dtype)
        assert isinstance(whole, DTensor)
        yield name, whole.full_tensor()


def checkpoint_directory(path: str) -> Path | None:
    """The model's directory when it is one (its tokenizer files are copied beside saved weights)."""
    return Path(path) if Path(path).is_dir() else None
