"""A tiny Qwen3 made in code, batches of random tokens, and a trainer of one rank in the test's own process."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from grpo_worker.config.job import Spec
from grpo_worker.protocol.messages import Array, TrainBatch
from grpo_worker.trainer.batch import Sequences
from grpo_worker.trainer.distributed import Ranks, join
from grpo_worker.trainer.model import PolicyModel, build_policy, named_parameters
from grpo_worker.trainer.optimizer import PolicyOptimizer, StepResult
from grpo_worker.trainer.options import TrainerOptions
from grpo_worker.trainer.update import TrainerState, Updater
from grpo_worker.trainer.user_loss import policy_loss

VOCABULARY = 64
torch.set_num_threads(1)  # a tiny model's matrix products are shorter than a thread barrier


def save_tiny_model(directory: Path, tied: bool = True, seed: int = 0, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))
    model.save_pretrained(directory)
    return directory


def batch_message(lengths: list[tuple[int, int]], seed: int = 0, mini_batches: list[int] | None = None) -> TrainBatch:
    """Random tokens for (prompt, response) lengths; old log-probs near those of a random policy; a mask with holes."""
    random = np.random.default_rng(seed)
    responses = sum(r for _, r in lengths)
    token_ids = random.integers(0, VOCABULARY, sum(map(sum, lengths)))
    mask = (random.random(responses) > 0.15).astype(np.uint8)
    return TrainBatch(
        prompt_lengths=Array.of([p for p, _ in lengths], "int32"),
        response_lengths=Array.of([r for _, r in lengths], "int32"),
        token_ids=Array.of(token_ids, "int32"),
        response_mask=Array.of(mask, "uint8"),
        old_log_probs=Array.of(random.normal(-4.2, 0.3, responses), "float32"),
        ref_log_probs=Array.of(random.normal(-4.2, 0.3, responses), "float32"),
        advantages=Array.of(np.repeat(random.normal(size=len(lengths)), [r for _, r in lengths]), "float32"),
        is_weights=Array.of(random.uniform(0.5, 2.0, responses), "float32"),
        mini_batch_sequences=mini_batches or [],
    )


def sequences_of(lengths: list[tuple[int, int]], **keywords: Any) -> Sequences:
    return Sequences.of(batch_message(lengths, **keywords))


def without_old_log_probs(sequences: Sequences) -> Sequences:
    """The engine's log-probs in their place: the update makes old ones and weights itself."""
    values = {"advantages": sequences.values["advantages"], "rollout_log_probs": sequences.values["old_log_probs"]}
    return replace(sequences, values=values)


def options_for(path: Path, device: Literal["cuda", "cpu"] = "cpu", **sections: Any) -> TrainerOptions:
    """A trainer of the model at `path`; `sections` are those of the document's spec, as a person writes them."""
    spec: dict[str, Any] = {
        "model": {"path": str(path), "headChunkSize": 16},
        "data": {"maxPromptLength": 64, "maxResponseLength": 64},
        "actor": {"optim": {"lr": 1e-3}},
    }
    for name, section in sections.items():
        spec[name] = spec.get(name, {}) | section if isinstance(section, dict) else section
    return TrainerOptions(Spec.model_validate(spec), device)


def plain_log_probs(model: Path, sequences: Sequences, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs, entropy) of the response tokens by plain Transformers on the CPU, one sequence at a time."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    log_probs, entropies = [], []
    for i in range(sequences.count):
        ids = torch.from_numpy(
            sequences.token_ids[sequences.token_offsets[i] : sequences.token_offsets[i + 1]].astype(np.int64)
        )
        with torch.no_grad():
            logits = lm(ids[None]).logits[0] / temperature
        table = torch.log_softmax(logits, dim=-1)
        prompt = int(sequences.prompt_lengths[i])
        rows = table[prompt - 1 : -1]
        log_probs.append(rows.gather(-1, ids[prompt:, None]).squeeze(-1))
        entropies.append(-(rows.exp() * rows).sum(-1))
    return torch.cat(log_probs).numpy(), torch.cat(entropies).numpy()


@functools.cache
def single_rank() -> Ranks:
    """The test process as a world of one, joined once: a process group cannot be made twice in a process."""
    return join("cpu", 60.0, seed=0)


class RecordingOptimizer(PolicyOptimizer):
    """Keeps the whole gradient of each update, as it was before clipping."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gradients: list[dict[str, torch.Tensor]] = []

    def step(self, lr: float) -> StepResult:
        self.gradients.append({name: p.grad.full_tensor().clone() for name, p in self.parameters.items()})
        return super().step(lr)


def recorded_update(
    options: TrainerOptions, sequences: Sequences, ranks: Ranks
) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
    """(whole gradients of each optimizer update, metrics) of one training step from the saved model."""
    actor = options.spec.actor
    model = build_policy(options, ranks.mesh, param_offload=actor.fsdp.param_offload)
    optimizer = RecordingOptimizer(model, actor.optim, ranks, actor.fsdp.optimizer_offload)
    updater = Updater(model, optimizer, options, ranks, policy_loss(actor.loss_mode), TrainerState())
    metrics = updater.update(sequences, step=1)
    return optimizer.gradients, metrics


def whole_parameters(model: PolicyModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in named_parameters(model)}


def relative_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert list(actual) == list(expected)
    difference = sum(float((actual[name] - expected[name]).double().square().sum()) for name in actual)
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5
