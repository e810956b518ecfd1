"""A model directory in the Hugging Face format: safetensors, config, tokenizer.

Invariant: what is written loads in Transformers and vLLM as it is; a tied LM head is left out, as they expect.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

MAX_SHARD_BYTES = 5 * 10**9
INDEX_NAME = "model.safetensors.index.json"
# Everything a model directory may hold beside weights: tokenizers, chat templates, processors.
COPIED_PATTERNS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "*.tiktoken", "preprocessor_config.json", "LICENSE*",
)  # fmt: skip


def split_shards(sizes: Mapping[str, int], limit_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Names in their order, cut where the next tensor would pass the limit."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_model(
    directory: Path, lm: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype, source: Path | None
) -> None:
    """Write `state` and what belongs to it. `source` is the directory that the tokenizer's files are copied from."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    shards = split_shards(sizes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: state[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    config = copy.deepcopy(lm.config)
    config.architectures = [type(lm).__name__]
    config.dtype = dtype
    config.save_pretrained(directory)
    if lm.generation_config is not None:
        lm.generation_config.save_pretrained(directory)
    if source is not None:
        for pattern in COPIED_PATTERNS:
            for file_path in sorted(source.glob(pattern)):
                if file_path.is_file():
                    shutil.copyfile(file_path, directory / file_path.name)
