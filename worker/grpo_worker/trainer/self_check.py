"""Whether the trainer computes a model's log-probs, found out by trying: at each start, on a tiny copy, in seconds.

Invariant: no model is trained whose log-probs and gradient by our forward (packed or padded) and our chunked head were
not seen to equal plain Transformers': each sequence alone, eager attention, whole logits. What a tiny copy keeps is said
in `tiny_copy`; its parameters are random, those too that a model starts as zeros or ones, since a bias of zero or a scale
of one would pass whatever we do with it.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import MoeModelOutputWithPast

from grpo_worker.errors import ConfigError
from grpo_worker.trainer.batch import Sequences, collate
from grpo_worker.trainer.loading import without_weights
from grpo_worker.trainer.model import PolicyModel, attention_implementation, wrap_layers
from grpo_worker.trainer.tiny_copy import VOCABULARY, WINDOW_TOKENS, tiny_copy

log = logging.getLogger(__name__)

# (prompt, response): unequal, several windows long but for the last, the longest not first.
LENGTHS = ((3, 2 * WINDOW_TOKENS), (9, 4 * WINDOW_TOKENS), (1, 3 * WINDOW_TOKENS), (2, WINDOW_TOKENS - 4))
CHUNK_TOKENS = 16
FIRST_TOKEN = 8  # below are the special ones
# Sums in another order differ by a few float32 roundings, 6e-8 each, through some layers: 2e-5 was the most of any family
# that is right. The least that a neighbour, a window or a scale did was 3e-3. See docs/models.md.
TOLERANCE = 3e-4
MOST_PARAMETERS = 400_000_000  # of a copy whose widths could not be cut
WIDTH_GAIN = 1.5


@dataclass(frozen=True)
class Outcome:
    """`log_prob` is the largest absolute difference, `gradient` the relative one (L2, all parameters)."""

    log_prob: float = 0.0
    gradient: float = 0.0
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and max(self.log_prob, self.gradient) <= TOLERANCE

    def __str__(self) -> str:
        return self.error or f"log-probs differ by up to {self.log_prob:.1e}, the gradient by {self.gradient:.1e}"


class Specimen:
    """A tiny copy of one model with plain Transformers' results on it. Raises ConfigError when there is none."""

    def __init__(self, config: PreTrainedConfig, longest_tokens: int) -> None:
        self.sequences = _sequences()
        failures = []
        for narrow in (True, False):
            try:
                self.config = tiny_copy(config, longest_tokens, narrow)
                size = sum(p.numel() for p in _empty(self.config).parameters())
                if size > MOST_PARAMETERS:
                    raise ValueError(f"a copy of {size / 1e6:.0f} million parameters is too large to try")
                plain = self.build("eager")
                _randomise(plain)
                self.parameters = plain.state_dict()
                self.log_probs, self.gradient = _plain(plain, self.sequences)
                in_files = revert_weight_conversion(plain, dict(plain.named_parameters()))
                self.renamed = sorted(set(dict(plain.named_parameters())) - set(in_files))
                break
            except ConfigError:
                raise
            except Exception as error:  # whatever a foreign model's code raises
                failures.append(_words(error))
        else:
            raise ConfigError(
                f"model.path: {config.model_type} cannot be tried out ({'; '.join(dict.fromkeys(failures))}), so nobody knows whether it "
                "would be trained right. Choose a model of docs/models.md."
            )
        self.logit_scale, self.own_logit_scale = logit_scale(config), logit_scale(self.config)

    def build(self, implementation: str) -> PreTrainedModel:
        lm = AutoModelForCausalLM.from_config(self.config, attn_implementation=implementation, dtype=torch.float32)
        return lm.eval()

    def outcome(self, packed: bool) -> Outcome:
        """Ours beside plain Transformers."""
        try:
            lm = self.build(attention_implementation(self.config, packed))
            lm.load_state_dict(self.parameters)
            model = PolicyModel(lm, packed, CHUNK_TOKENS, self.own_logit_scale)
            wrap_layers(model, compile=False, recompute="full")
            batch = collate(self.sequences, range(self.sequences.count), packed, torch.device("cpu"))
            log_probs, _ = model(batch, 1.0)
            gradient = _gradient(lm, log_probs)
        except Exception as error:
            return Outcome(error=_words(error))
        pairs = ((gradient.get(name), wanted) for name, wanted in self.gradient.items())
        difference = sum(float((wanted if own is None else own - wanted).square().sum()) for own, wanted in pairs)
        scale = sum(float(g.square().sum()) for g in self.gradient.values())
        return Outcome(float((log_probs.detach() - self.log_probs).abs().max()), (difference / scale) ** 0.5)


def check_model(config: PreTrainedConfig, packed: bool, longest_tokens: int) -> float:
    """The scale of the model's logits (see `logit_scale`), for `build_policy`.

    Raises ConfigError, with the numbers and what to set, for a model that our forward would compute wrongly.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # CUDA's generators keep the rank's seed
        specimen = Specimen(config, longest_tokens)
        if specimen.renamed:
            raise ConfigError(
                f"model.path: Transformers renames or merges {config.model_type}'s tensors when it loads them "
                f"({specimen.renamed[0]} is not in the model's files), so engines and checkpoints could not get them under "
                "their own names. Choose another model; docs/models.md lists them."
            )
        outcome = specimen.outcome(packed)
        if not outcome.passed:
            # One start in a hundred of a right model was refused on a GPU machine (6.7e-4, where each other had 6e-6), and nobody
            # knows why. A model that is wrong is so each time.
            log.warning("%s, tried once more: %s", config.model_type, outcome)
            specimen = Specimen(config, longest_tokens)
            outcome = specimen.outcome(packed)
        if outcome.passed:
            return specimen.logit_scale
        if packed and specimen.outcome(packed=False).passed:
            raise ConfigError(
                f"model.useRemovePadding: {config.model_type} is wrong when sequences are packed: {outcome} "
                "(tried on a tiny copy, against Transformers). Set model.useRemovePadding: false."
            )
    raise ConfigError(
        f"model.path: {config.model_type} would be trained wrong: {outcome} (tried on a tiny copy, against Transformers). "
        "Choose another model; docs/models.md lists them."
    )


def logit_scale(config: PreTrainedConfig) -> float:
    """s in logits = s * (hidden @ head.T), at the configuration's width: 1 for most, 1/8 for Granite.

    Also 1 for a head that does anything else (a soft cap, a bias) or cannot be tried alone: the comparison tells.
    """
    try:
        lm: Any = _empty(tiny_copy(config, longest_tokens=1, narrow=False))
        head = lm.get_output_embeddings()
        for name, parameter in list(head.named_parameters()):
            setattr(head, name, nn.Parameter(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5, False))
        hidden: Any = torch.randn(1, 2, head.weight.shape[1])
        lm.base_model.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
        with torch.no_grad():
            logits = lm(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
            product = hidden @ head.weight.t()
        scale = float((logits * product).sum() / product.square().sum())
        return scale if torch.allclose(logits, scale * product, rtol=1e-4, atol=1e-6) else 1.0
    except Exception:  # whatever a foreign model's code raises
        return 1.0


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    with without_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _sequences() -> Sequences:
    prompts, responses = (np.array(lengths) for lengths in zip(*LENGTHS, strict=True))
    total = int((prompts + responses).sum())
    return Sequences(
        prompt_lengths=prompts,
        response_lengths=responses,
        token_ids=np.random.default_rng(0).integers(FIRST_TOKEN, VOCABULARY, total),
        token_offsets=np.concatenate([[0], np.cumsum(prompts + responses)]),
        response_offsets=np.concatenate([[0], np.cumsum(responses)]),
        response_mask=np.ones(int(responses.sum()), dtype=np.float32),
        values={},
        mini_batch_sequences=[len(LENGTHS)],
    )


def _randomise(lm: PreTrainedModel) -> None:
    """Matrices that keep the size of what they multiply, so that no layer's share drowns; noise on all vectors."""
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=WIDTH_GAIN * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _plain(lm: PreTrainedModel, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
    """(log-probs [response tokens], gradient by parameter name). Raises ConfigError for a model that looks ahead."""
    parts = []
    for i in range(sequences.count):
        ids = torch.from_numpy(sequences.token_ids[sequences.token_offsets[i] : sequences.token_offsets[i + 1]])
        prompt = int(sequences.prompt_lengths[i])
        logits = lm(input_ids=ids[None], use_cache=False).logits[0].float()
        with torch.no_grad():
            early = lm(input_ids=ids[None, :-4], use_cache=False).logits[0].float()
        if not torch.allclose(early, logits[:-4], atol=1e-3, rtol=1e-3):
            raise ConfigError(
                f"model.path: {lm.config.model_type} is no causal model: a token's logits depend on later ones."
            )
        parts.append(logits[prompt - 1 : -1].log_softmax(-1).gather(-1, ids[prompt:, None]).squeeze(-1))
    log_probs = torch.cat(parts)
    return log_probs.detach(), _gradient(lm, log_probs)


def _gradient(lm: PreTrainedModel, log_probs: Tensor) -> dict[str, Tensor]:
    """Of a sum with a weight of its own for each token."""
    weights = torch.linspace(-1.0, 1.5, len(log_probs))
    (log_probs * weights).sum().backward()
    return {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


def _words(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
