"""Models and data of `benchmarks.side_by_side`.

Invariant: models and data are functions of fixed seeds and nothing is downloaded. The models have the shapes of Qwen3 and random weights; their
tokens are the demo's characters and 151,870 ids that stand for nothing. Random weights end a response as good as never, so nearly every
sample is as long as it may be, and the steps are alike.

    python -m benchmarks.side_by_side.inputs runs/inputs --shape 0.6b
"""

import argparse
import random
from pathlib import Path
from typing import Any

PROMPTS = 2048


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    } | others


SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": _qwen3(1024, 3072, 28, 16),
    "1.7b": _qwen3(2048, 6144, 28, 16),
    "4b": _qwen3(2560, 9728, 36, 32),
    # half a million parameters, for a CPU
    "tiny": _qwen3(128, 384, 2, 4, vocab_size=1024, num_key_value_heads=2, head_dim=32),
}


def add_batch(parser: argparse.ArgumentParser, prompt_tokens: int, response_tokens: int) -> None:
    """What every side is told of a step; the lengths are the defaults."""
    parser.add_argument("--prompts", type=int, default=64, help="a step, or a round")
    parser.add_argument("--samples", type=int, default=8, help="a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=prompt_tokens)
    parser.add_argument("--response-tokens", type=int, default=response_tokens)
    parser.add_argument("--plain", action="store_true", help="prompts are text, not a chat")


def noise(sample: Any) -> float:
    """A reward that no policy can learn: uniform in 0..1, whatever the answer is. Most texts of these models are alike (empty), and a reward
    by text would make groups of equal rewards, which one side skips and the other trains."""
    return random.random()


def make_model(directory: Path, shape: dict[str, Any]) -> int:
    """A random bfloat16 model with the character tokenizer. Returns its number of parameters."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from grpo_worker.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**shape, **special, bos_token_id=None, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config).bfloat16()
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def make_data(path: Path) -> None:
    """Additions such as `482+359=`: 8 tokens each."""
    import pyarrow as pa

    from grpo_worker.data.write import write_shuffled
    from grpo_worker.demo.tasks import split_problems

    problems, _ = split_problems(1, PROMPTS, 8)
    rows = [{"prompt": problem.prompt, "response": "", "reward": problem.answer} for problem in problems]
    write_shuffled(pa.Table.from_pylist(rows), path, seed=1, overwrite=True)


def make(directory: Path, shape: str) -> int:
    """`model` and `train.parquet` in `directory`. Returns the model's number of parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    make_data(directory / "train.parquet")
    return make_model(directory / "model", SHAPES[shape])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    arguments = parser.parse_args()
    parameters = make(arguments.directory, arguments.shape)
    print(f"{arguments.directory}: model of {parameters:,} parameters, {PROMPTS} prompts")


if __name__ == "__main__":
    main()
