"""A model directory in the Hugging Face format: the source's files, and weights of our own.

Invariant: what is written is what the source was, but for the weights: other files are copied byte for byte, and config.json
changes in what the weights changed. So it loads in Transformers and vLLM as the source does; a tied LM head is left out, as they
expect.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from grpo_worker.checkpoint.files import make_directory
from grpo_worker.model_files import CONFIG_FILE, INDEX_FILE, files_beside_weights
from grpo_worker.trainer.distributed import Ranks
from grpo_worker.trainer.model import PolicyModel, gathered_parameters, named_parameters

MAX_FILE_BYTES = 5 * 10**9
MIN_FILE_BYTES = 1 << 28  # of a file that is split off only so that another rank may hold and write it


@dataclass(frozen=True)
class WeightFiles:
    """Which tensor is in which file, the same on all ranks, and host copies of the tensors that this rank writes, by file."""

    split: StateDictSplit
    mine: dict[str, dict[str, Tensor]]

    @classmethod
    def copied(cls, model: PolicyModel, dtype: torch.dtype, ranks: Ranks) -> "WeightFiles":
        """Of the model's present weights in `dtype`. No rank holds much more than its share of them. Collective."""
        shapes = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in named_parameters(model)}
        share = sum(tensor.nbytes for tensor in shapes.values()) // ranks.world_size + 1
        split = split_torch_state_dict_into_shards(
            shapes, max_shard_size=min(max(share, MIN_FILE_BYTES), MAX_FILE_BYTES)
        )
        files = list(split.filename_to_tensors)
        mine: dict[str, dict[str, Tensor]] = {file: {} for file in files[ranks.rank :: ranks.world_size]}
        for name, tensor in gathered_parameters(model, dtype, ranks.device):
            if (part := mine.get(split.tensor_to_filename[name])) is not None:
                part[name] = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda).copy_(tensor)
        return cls(split, mine)

    def write(self, directory: Path) -> list[Path]:
        """This rank's files; the copies are given up on the way."""
        written = []
        while self.mine:
            file, tensors = self.mine.popitem()
            save_file(tensors, directory / file, metadata={"format": "pt"})
            written.append(directory / file)
        return written


def write_beside_weights(
    directory: Path, lm: PreTrainedModel, split: StateDictSplit, dtype: torch.dtype, source: Path
) -> list[Path]:
    """Everything but the weights, on one rank; the files written. `source` is the model's directory."""
    texts = {CONFIG_FILE: _config(lm, dtype, source)}
    if split.is_sharded:
        texts[INDEX_FILE] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for name, content in texts.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    copied = list(files_beside_weights(source))
    for path in copied:
        make_directory((directory / path).parent)
        shutil.copyfile(source / path, directory / path)
    return [directory / path for path in (*map(Path, texts), *copied)]


def _config(lm: PreTrainedModel, dtype: torch.dtype, source: Path) -> dict[str, Any]:
    """The source's config.json with our dtype and class; the loaded one when it is of another kind (the text part of a larger model)."""
    config: dict[str, Any] = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("model_type") != lm.config.model_type:
        config = lm.config.to_dict()
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return config | {"architectures": [type(lm).__name__]} | dict.fromkeys(names, str(dtype).removeprefix("torch."))
