"""A model directory in the Hugging Face format: the source's files, and weights of our own.

Invariant: what is written is what the source was, but for the weights: other files are copied byte for byte, and config.json
changes in what the weights changed. So it loads in Transformers and vLLM as the source does; a tied LM head is left out, as they
expect.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from grpo_worker.model_files import CONFIG_FILE, INDEX_FILE, files_beside_weights

MAX_SHARD_BYTES = 5 * 10**9


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
    directory: Path, lm: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype, source: Path
) -> None:
    """Write `state` and what belongs to it. `source` is the model's directory."""
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
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (directory / CONFIG_FILE).write_text(json.dumps(_config(lm, dtype, source), indent=2, ensure_ascii=False) + "\n")
    for name in files_beside_weights(source):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, directory / name)


def _config(lm: PreTrainedModel, dtype: torch.dtype, source: Path) -> dict[str, Any]:
    """The source's config.json with our dtype and class; the loaded one when it is of another kind (the text part of a larger model)."""
    config: dict[str, Any] = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    loaded = lm.config.to_dict()
    if config.get("model_type") != lm.config.model_type:
        config = loaded
    elif "quantization_config" not in loaded:  # undone when the model was loaded
        config.pop("quantization_config", None)
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return config | {"architectures": [type(lm).__name__]} | dict.fromkeys(names, str(dtype).removeprefix("torch."))
