"""Model, data and reward of the GPU benchmark `h100_qwen3_0_6b.yaml`.

Invariant: everything is a function of fixed seeds and nothing is downloaded. The model has Qwen3-0.6B's shape and random
weights; its tokens are the demo's characters and 151,870 ids that stand for nothing.

    python -m benchmarks.h100_qwen3_0_6b                 # then: grpo run benchmarks/h100_qwen3_0_6b.yaml
    python -m benchmarks.h100_qwen3_0_6b --scaled-down   # the same with a model that a CPU can train
"""

import argparse
import random
from pathlib import Path
from typing import Any

DIRECTORY = Path("runs/qwen3-0.6b-inputs")
PROMPTS = 2048
QWEN3_0_6B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SCALED_DOWN: dict[str, Any] = {
    **QWEN3_0_6B,
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def noise(sample: Any) -> float:
    """A reward that no policy can learn: uniform in 0..1 by prompt and text."""
    return random.Random(sample.uid + sample.response).random()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help=f"default {DIRECTORY}, which the job names")
    parser.add_argument("--scaled-down", action="store_true", help="a model of half a million parameters")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    shape = SCALED_DOWN if arguments.scaled_down else QWEN3_0_6B
    parameters = make_model(arguments.directory / "model", shape)
    make_data(arguments.directory / "train.parquet")
    print(f"{arguments.directory}: model of {parameters:,} parameters, {PROMPTS} prompts")


if __name__ == "__main__":
    main()
