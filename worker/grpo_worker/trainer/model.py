"""The policy: a Hugging Face causal LM, sharded by FSDP2, that turns packed tokens into log-probs.

Invariants: master weights are float32 and sharded, compute runs in the compute dtype, gradients are *summed* over
ranks in float32 (the loss is already divided by global counts). Dropout is off: the ratio compares log-probs of one
function. The LM head runs inside `forward`, where FSDP has gathered it. Parameter names, less the wrapper's prefix,
are the checkpoint's.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from grpo_worker.config.actor import ActorFSDP
from grpo_worker.errors import ConfigError, DataError, one_line
from grpo_worker.model_files import CONFIG_FILE
from grpo_worker.trainer import attention
from grpo_worker.trainer.batch import MicroBatch
from grpo_worker.trainer.loading import load_shards, without_weights
from grpo_worker.trainer.logprobs import EAGER, ChunkKernels, chunked_log_probs
from grpo_worker.trainer.options import TrainerOptions
from grpo_worker.weightsync.broadcast import buckets
from grpo_worker.weightsync.manifest import TensorSpec
from grpo_worker.weightsync.snapshot import dtype_name

PREFIX = "lm."
GATHER_BYTES = 64 << 20


class PolicyModel(nn.Module):
    """forward: a micro-batch in, (log-probs, entropy) of its response tokens out, float32 [response tokens]."""

    def __init__(
        self,
        lm: PreTrainedModel,
        packed: bool,
        chunk_tokens: int,
        logit_scale: float = 1.0,
        kernels: ChunkKernels = EAGER,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.packed = packed
        self.chunk_tokens = chunk_tokens
        self.logit_scale = logit_scale
        self.kernels = kernels

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, whatever the model calls them: FSDP's units."""
        count = self.lm.config.get_text_config().num_hidden_layers
        lists = (module for module in self.lm.base_model.modules() if isinstance(module, nn.ModuleList))
        found = next((layers for layers in lists if len(layers) == count), None)
        if found is None:
            raise ConfigError(f"model.path: {type(self.lm).__name__} has no list of its {count} layers.")
        return found

    def forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        if self.packed:
            assert batch.segments is not None
            arguments = batch.segments.arguments()
            arguments["position_ids"] = batch.position_ids
        else:
            arguments = {"attention_mask": batch.attention_mask}
        output = self.lm.base_model(input_ids=batch.input_ids, use_cache=False, return_dict=True, **arguments)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.predict_index]
        weight = self.lm.get_output_embeddings().weight
        scaled = temperature / self.logit_scale
        return chunked_log_probs(hidden, weight, batch.targets, scaled, self.chunk_tokens, self.kernels)


def set_float32_precision(tf32: bool) -> None:
    """Whether this process's float32 matrix products and convolutions may be rounded to TF32's 10 bits on a GPU.

    Exact also when the model runs in bfloat16: what it still computes in float32 (rotary angles) is so for a reason.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # PyTorch's own default is True


def load_config(directory: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: {directory / CONFIG_FILE} does not load: {one_line(error)}") from error


def attention_implementation(config: PreTrainedConfig, packed: bool) -> str:
    """Ours for packed rows; for padded ones PyTorch's, or Transformers' own where a model has no other."""
    if packed:
        return attention.PACKED_ATTENTION
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "sdpa" if model_class._supports_sdpa else "eager"


def check_length(config: PreTrainedConfig, options: TrainerOptions) -> None:
    """Raises ConfigError when the job's sequences may be longer than the model's positions."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and options.max_sequence_tokens > longest:
        raise ConfigError(
            f"data.maxPromptLength + data.maxResponseLength = {options.max_sequence_tokens} is over the model's "
            f"max_position_embeddings of {longest}."
        )


def build_policy(
    options: TrainerOptions,
    mesh: DeviceMesh,
    *,
    logit_scale: float = 1.0,
    trainable: bool = True,
    param_offload: bool = False,
) -> PolicyModel:
    """The model of `options`, sharded over `mesh`, each rank's rows read from the files. Raises DataError.

    A model that is not trainable is kept in the compute dtype (it is cast to that for use anyway).
    """
    section, compute_dtype = options.spec.model, options.compute_dtype
    stored_dtype = torch.float32 if trainable else compute_dtype
    config = load_config(options.model_directory)
    implementation = attention_implementation(config, section.use_remove_padding)
    with without_weights():
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    kernels = ChunkKernels(options.compile)
    model = PolicyModel(lm.eval(), section.use_remove_padding, options.chunk_tokens, logit_scale, kernels)
    for parameter in model.parameters():  # not the buffers: rotary frequencies are float32 whatever the weights are
        parameter.data = parameter.data.to(stored_dtype)
    model.requires_grad_(trainable)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=options.device == "cuda") if param_offload else OffloadPolicy()
    # Where a rank has the whole model, nothing is gained by freeing the gathered parameters between forward and backward.
    reshard = mesh["shard"].size() > 1 or param_offload
    wrap_layers(
        model,
        options.compile,
        section.gradient_checkpointing if section.enable_gradient_checkpointing and trainable else None,
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    load_shards(model, options.model_directory, torch.device("cpu" if param_offload else options.device), PREFIX)
    if mesh.size() > 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def set_reductions(model: PolicyModel, mesh: DeviceMesh, fsdp: ActorFSDP, last: bool) -> None:
    """What the next backward pass does with gradients, `last` of its update or not (`actor.fsdp.gradientReduction`).

    After the last one all gradients are reduced and nothing is gathered any more, whatever the field says.
    """
    each = last or fsdp.gradient_reduction == "microBatch"
    whole = mesh["shard"].size() == 1 and not fsdp.param_offload
    module: Any = model  # FSDPModule, since `fully_shard`
    module.set_requires_gradient_sync(each or (fsdp.gradient_reduction == "auto" and not whole))
    module.set_requires_all_reduce(each)
    # Parameters that do not change between micro-batches need not be cast again where they may stay.
    module.set_reshard_after_backward(each or not whole)


def wrap_layers(model: PolicyModel, compile: bool, recompute: Literal["full", "selective"] | None) -> None:
    """Compile and checkpoint each layer's forward. FSDP's hooks stay outside: recomputation gathers nothing again."""
    for layer in model.layers:
        forward: Callable[..., Any] = layer.forward
        if recompute == "selective":  # inside what is compiled, whose partitioner then knows what to keep
            forward = _checkpointed(
                forward, context_fn=partial(create_selective_checkpoint_contexts, _kept_operators())
            )
        if compile:
            forward = torch.compile(forward, dynamic=True)
        if recompute == "full":
            forward = _checkpointed(forward)
        layer.forward = forward


def _checkpointed(inner: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **settings, **kwargs)

    return forward


def _kept_operators() -> list[Any]:
    """Matrix products and attention, whichever of them this PyTorch has."""
    names = (
        "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._grouped_mm", "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention", "torch_attn._varlen_attn",
    )  # fmt: skip
    packets = (name.split(".") for name in names)
    return [
        getattr(getattr(torch.ops, space), name).default
        for space, name in packets
        if hasattr(getattr(torch.ops, space), name)
    ]


def named_parameters(model: PolicyModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their checkpoint names, in layer order; a tied LM head is left out, as in the checkpoint."""
    for name, parameter in model.named_parameters():
        yield name.removeprefix(PREFIX), parameter


def gathered_parameters(model: PolicyModel, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors in `dtype`, in layer order. Collective: each rank must run it to the end, in step.

    Neighbours are gathered together, while those before them are used: a collective for each tensor costs more than its bytes.
    """
    under_way: Gather | None = None
    parameters = named_parameters(model)
    for bucket in buckets(tensor_specs(model, dtype), GATHER_BYTES):
        following = Gather(list(islice(parameters, len(bucket))), dtype, device)
        if under_way is not None:
            yield from under_way.tensors()
        under_way = following
    if under_way is not None:
        yield from under_way.tensors()


def tensor_specs(model: PolicyModel, dtype: torch.dtype) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(p.shape), dtype_name(dtype)) for name, p in named_parameters(model)]


class Gather:
    """Parameters on their way to every rank, in one collective. Shards are cast before: half the bytes travel, and it comes to the same."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], dtype: torch.dtype, device: torch.device) -> None:
        self._parameters, self._dtype, self._device = parameters, dtype, device
        first = parameters[0][1]
        assert isinstance(first, DTensor)
        self._group = first.device_mesh["shard"].get_group()  # of the ranks that share one copy of the model
        self._ranks = dist.get_world_size(self._group)
        if self._ranks == 1:
            return
        self._sizes = [
            -(-p.shape[0] // self._ranks) * p[:1].numel() for _, p in parameters
        ]  # of the largest rank's shard
        self._mine = torch.zeros(sum(self._sizes), dtype=dtype, device=device)
        for place, (_, parameter) in zip(self._mine.split(self._sizes), parameters, strict=True):
            shard = _shard(parameter).flatten()
            place[: len(shard)].copy_(shard)
        self._whole = torch.empty(self._ranks * len(self._mine), dtype=dtype, device=device)
        self._work = dist.all_gather_into_tensor(self._whole, self._mine, group=self._group, async_op=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each in memory of its own."""
        if self._ranks == 1:
            for name, parameter in self._parameters:
                yield name, _shard(parameter).to(device=self._device, dtype=self._dtype)
            return
        self._work.wait()
        pieces = self._whole.view(self._ranks, -1).split(self._sizes, dim=1)
        for (name, parameter), piece in zip(self._parameters, pieces, strict=True):
            # Shards have whole rows, and all but the last ranks' are full.
            yield name, piece.reshape(-1)[: parameter.numel()].view(parameter.shape)


def _shard(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
