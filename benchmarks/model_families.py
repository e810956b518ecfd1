"""Which causal language models of the installed Transformers the trainer computes right: the table of docs/models.md.

Invariant: the verdicts are those of the check that each trainer makes when it starts (`trainer/self_check.py`), on a tiny
copy of each family's default configuration, or of one with the settings of its released models where the default leaves
out what matters.

    python -m benchmarks.model_families > docs/models.md
    python -m benchmarks.model_families granite lfm2     # some of them
"""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_worker.errors import ConfigError, one_line
from grpo_worker.trainer.self_check import TOLERANCE, Outcome, Specimen

LIMIT_SECONDS = 240
LONGEST_TOKENS = 1536  # data.maxPromptLength + data.maxResponseLength by default
CONVOLUTIONS = ["conv", "conv", "full_attention", "conv", "conv", "full_attention"]
WINDOWS = ["sliding_attention", "full_attention"] * 2
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"lm_head_multiplier": 0.0195, "embedding_multiplier": 5.66, "key_multiplier": 0.39},
    "granite": {
        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
    },
    "granitemoe": {"logits_scaling": 6.0, "attention_multiplier": 0.015625},
    "granitemoeshared": {"logits_scaling": 6.0, "attention_multiplier": 0.015625},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": CONVOLUTIONS, "num_hidden_layers": 6},
    "lfm2_moe": {"layer_types": CONVOLUTIONS, "num_hidden_layers": 6},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
    "qwen3_5_text": {},
}  # fmt: skip
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 1024},
    "qwen2": {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 2},
    "gemma3_text": {"sliding_window": 1024},
    "phi3": {"sliding_window": 1024},
}


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after so long."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def examine(family: str, settings: dict[str, Any]) -> tuple[str, str, str]:
    """(packed, padded, remark) of one family."""
    try:
        with torch.random.fork_rng(devices=[]), limited(LIMIT_SECONDS):
            torch.manual_seed(0)
            specimen = Specimen(CONFIG_MAPPING[family](**settings), LONGEST_TOKENS)
            packed, padded = specimen.outcome(True), specimen.outcome(False)
    except ConfigError as error:
        return "-", "-", f"refused: {_reason(str(error))}"
    except Exception as error:
        return "-", "-", f"refused: {type(error).__name__}: {one_line(error)[:80]}"
    remarks = []
    if specimen.renamed:
        remarks.append(f"refused: the files name it otherwise ({specimen.renamed[0].split('.', 3)[-1]})")
    elif not padded.passed and not packed.passed:
        remarks.append(f"refused{_head(specimen)}")
    elif not packed.passed:
        remarks.append("useRemovePadding: false")
    if specimen.logit_scale != 1:
        remarks.append(f"logits x {specimen.logit_scale:.3g}")
    return _number(packed), _number(padded), "; ".join(remarks)


def _head(specimen: Specimen) -> str:
    """What sets its logits apart, in words."""
    lm = specimen.build("eager")
    head = lm.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        return ": a bias in its head"
    return ": a soft cap on its logits" if "cap" in " ".join(vars(lm.config.get_text_config())) else ""


def _number(outcome: Outcome) -> str:
    if outcome.error:
        return f"no: {outcome.error.removeprefix('ConfigError: model.path: ')[:60]}".replace("|", "/")
    return f"{'right' if outcome.passed else 'no'}, {max(outcome.log_prob, outcome.gradient):.0e}"


def _reason(text: str) -> str:
    for start, end in (("cannot be tried out (", "), so nobody"), ("is no causal model", ":")):
        if start in text:
            inside = text.split(start, 1)[1].split(end, 1)[0] if end != ":" else "looks ahead: no causal model"
            return inside[:110].replace("|", "/")
    return text[:110].replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="default all")
    families = parser.parse_args().families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(HEAD.format(version=transformers.__version__, tolerance=TOLERANCE))
    cases = [(family, family, SETTINGS.get(family, {})) for family in families]
    cases += [(name, f"{name}, window {WINDOWED[name]['sliding_window']}", WINDOWED[name]) for name in families if name in WINDOWED]  # fmt: skip
    for family, title, settings in cases:
        started = time.perf_counter()
        print(f"| {title} | {' | '.join(examine(family, settings))} |", flush=True)
        print(f"{title}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


HEAD = """\
# Models

The trainer does not have a list of models. When it starts, it makes a tiny copy of the model's configuration (fewer and narrower layers,
the same structure), computes log-probs and gradient of some short sequences with it as it will in training, and compares them with
plain Transformers' (each sequence alone, eager attention, whole logits). A difference over {tolerance:.0e} in a log-prob, or in the gradient
(relative), ends the run with the numbers before any weight is loaded. So does a model whose weights Transformers renames or merges on
loading, as it does with most mixtures of experts: engines and checkpoints need them under the names of the model's files.

The table is what that check says of each family of Transformers {version}, with its default configuration (or its released models'
settings where those decide) and sequences of up to 1,536 tokens: a configuration of yours is checked as it is. `packed` is the default;
`padded` is `model.useRemovePadding: false`. The numbers are the larger of the two differences. It says nothing of vLLM, which has
[a list of its own](https://docs.vllm.ai/en/latest/models/supported_models.html). Made with `python -m benchmarks.model_families`.

| family | packed | padded | |
| --- | --- | --- | --- |"""


if __name__ == "__main__":
    main()
