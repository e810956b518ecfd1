"""What each phase of a colocated job needs of a device, from the document and the model's shape, before anything is allocated.

Invariant: pure arithmetic, the same in every role; a job that does not fit is refused with its terms. Dense decoders only: of others there is
no plan, and what they need is found out by running them.

Activations are those of a compiled decoder layer in bfloat16; what was measured beside the plan stands in docs/benchmarks.md.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_worker.config.job import Spec
from grpo_worker.errors import ConfigError
from grpo_worker.model_files import CONFIG_FILE, parameter_count

GIB = 1 << 30
CONTEXT_BYTES = GIB  # of one process on a device: CUDA's context, libraries, collectives
# Of an engine beside its weights, KV cache and logits: context, captured graphs, activations of a step. What of it stays while it sleeps.
ENGINE_BYTES, ASLEEP_BYTES = 5 * GIB, 4 * GIB
BUCKET_BYTES = 256 << 20  # of weights on their way
BUCKETS = 12  # or large tensors: the sender's two and the shared one, the receiver's two and what its loader holds
SPARE_SHARE = 0.03  # of the device: fragments
HEAD_COPIES = 1.5  # of a chunk's float32 logits that exist at a time
LOGIT_COPIES = 3  # of an engine's: as they come, scaled, sorted or summed


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder, as its config.json and its files say."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    query: int  # all heads' widths together
    key: int
    vocabulary: int
    tables: int  # of embeddings: the head's own, or one for both

    @classmethod
    def of(cls, directory: Path) -> "ModelShape | None":
        """None for a mixture of experts and for configurations without the usual names."""
        config: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        experts = any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        sizes = [config.get(name) for name in names]
        if experts or not all(isinstance(size, int) for size in sizes):
            return None
        layers, hidden, intermediate, heads, vocabulary = (int(size) for size in sizes if size is not None)
        width = config.get("head_dim") or hidden // heads
        keys = config.get("num_key_value_heads") or heads
        return cls(
            parameter_count(directory), layers, hidden, intermediate, heads * width, keys * width, vocabulary,
            1 if config.get("tie_word_embeddings") else 2,
        )  # fmt: skip

    @property
    def embedding(self) -> int:
        return self.tables * self.vocabulary * self.hidden

    def activations(self, recomputation: str | None) -> int:
        """Elements that the backward pass needs of each token (of the layers' inputs on, without the head)."""
        projected = self.query + 2 * self.key
        products = projected + self.query + 2 * self.intermediate + 3 * self.hidden
        everything = products + 2 * (self.query + self.key) + self.intermediate + self.hidden
        match recomputation:
            case "full":
                return self.layers * self.hidden + everything
            case "selective":
                return self.layers * products + everything
        return self.layers * everything


@dataclass(frozen=True)
class Phase:
    """Bytes of one device, by what has them."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        terms = " + ".join(f"{what} {size / GIB:.1f}" for what, size in self.parts.items() if size >= GIB / 20)
        return f"{self.name}: {terms} = {self.total / GIB:.1f} GiB"


@dataclass(frozen=True)
class MemoryPlan:
    """Of each device of a job. `moments_leave`: the optimizer's states go to the host while the engine works."""

    device_bytes: int
    generating: Phase
    updating: Phase
    syncing: Phase
    moments_leave: bool
    kv_cache_bytes: int  # of the engine, on each of its devices
    remedies: list[str] = field(default_factory=list)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.generating, self.updating, self.syncing

    @property
    def usable_bytes(self) -> int:
        return int(self.device_bytes * (1 - SPARE_SHARE))

    @property
    def room_to_warm_up(self) -> bool:
        """Whether a pass over a few tokens fits beside an engine that is awake."""
        pass_over_few = self.updating.parts["gathered weights"] + self.updating.parts["gradients"]
        return self.generating.total + pass_over_few <= self.usable_bytes

    def check(self) -> None:
        """Raises ConfigError for a job that does not fit, with the arithmetic."""
        usable = self.usable_bytes
        if not (over := [phase for phase in self.phases if phase.total > usable]) and self.kv_cache_bytes > 0:
            return
        what = "; ".join(map(str, over)) or (
            f"the engine's share leaves {self.kv_cache_bytes / GIB:.1f} GiB for its KV cache: raise rollout.gpuMemoryUtilization"
        )
        raise ConfigError(
            f"placement: Colocated does not fit on a device of {self.device_bytes / GIB:.1f} GiB ({usable / GIB:.1f} usable). {what}. "
            f"What would make room: {', '.join(self.remedies)}, or more trainer.gpusPerNode."
        )


def checked_plan(spec: Spec, directory: Path, device_bytes: int) -> MemoryPlan | None:
    """The plan of a job with the model of `directory`; None where there is no plan of it. Raises ConfigError when it does not fit."""
    if (shape := ModelShape.of(directory)) is None:
        return None
    plan = plan_memory(spec, shape, device_bytes)
    plan.check()
    return plan


def plan_memory(spec: Spec, shape: ModelShape, device_bytes: int) -> MemoryPlan:
    """The plan of a job on GPUs of so many bytes, bfloat16 compute and float32 masters."""
    fsdp, size = spec.actor.fsdp, shape.parameters
    shards = spec.ranks if fsdp.shard_size == -1 else fsdp.shard_size
    whole = shards == 1
    on_device = not fsdp.param_offload
    reference = spec.actor.use_kl_loss or spec.algorithm.use_kl_in_reward
    trainer = {
        "trainer's context": CONTEXT_BYTES,
        "master weights": 4 * size // shards * on_device,
        "reference": 2 * size // shards * (reference and not spec.ref.fsdp.param_offload),
    }
    moments = {"optimizer's moments": 8 * size // shards * (not fsdp.optimizer_offload)}
    engine_bytes = int(spec.rollout.gpu_memory_utilization * device_bytes)
    engine_weights = 2 * size // spec.rollout.tensor_parallel_size
    awake, asleep = {"engine": engine_bytes}, {"sleeping engine": ASLEEP_BYTES}
    usable = device_bytes * (1 - SPARE_SHARE)
    moments_leave = not fsdp.optimizer_offload and sum((awake | trainer | moments).values()) > usable
    resting = {} if moments_leave else moments
    layer = (size - shape.embedding) // shape.layers
    once = (whole and on_device) or fsdp.gradient_reduction == "update"
    recomputation = spec.model.gradient_checkpointing if spec.model.enable_gradient_checkpointing else None
    tokens = max(spec.actor.token_budget, spec.data.max_prompt_length + spec.data.max_response_length)
    chunk = min(spec.model.head_chunk_size or 4096, tokens)
    # The root unit (embedding, head) stays gathered between forward and backward; of layers there are two at a time.
    updating = {
        "gathered weights": 2 * size if whole and on_device else 2 * (shape.embedding + 2 * layer),
        "gradients": 4 * size // shards * on_device + (4 * size if once else 4 * (shape.embedding + layer)),
        "activations": 2 * shape.activations(recomputation) * tokens,
        "head": int(HEAD_COPIES * 4 * chunk * shape.vocabulary),
    }
    buckets = {"weights on their way": BUCKETS * max(BUCKET_BYTES, 2 * shape.vocabulary * shape.hidden)}
    kv_cache = (
        engine_bytes - engine_weights - ENGINE_BYTES - 4 * LOGIT_COPIES * spec.rollout.max_num_seqs * shape.vocabulary
    )
    remedies = [
        remedy
        for remedy, helps in (
            ("model.enableGradientCheckpointing: true", recomputation is None),
            ("model.gradientCheckpointing: full", recomputation == "selective"),
            (f"actor.ppoMaxTokenLenPerGPU below {spec.actor.token_budget}", True),
            (f"rollout.gpuMemoryUtilization below {spec.rollout.gpu_memory_utilization}", True),
            ("actor.fsdp.optimizerOffload: true", not fsdp.optimizer_offload),
            ("ref.fsdp.paramOffload: true", reference and not spec.ref.fsdp.param_offload),
            ("actor.fsdp.paramOffload: true", on_device),
        )
        if helps
    ]
    return MemoryPlan(
        device_bytes,
        generating=Phase("while the engines generate", awake | trainer | resting),
        updating=Phase("while the trainer updates", asleep | trainer | moments | updating),
        syncing=Phase("while weights are handed over", asleep | {"engine's weights": engine_weights} | trainer | resting | buckets),
        moments_leave=moments_leave,
        kv_cache_bytes=kv_cache,
        remedies=remedies,
    )  # fmt: skip
