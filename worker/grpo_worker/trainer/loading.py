"""Weights from the model's files into the shards of a model that was built without any.

Invariant: a rank reads its own rows of each tensor and holds nothing of the others: memory on its way is one tensor's
rows. A parameter that the files do not hold under its own name and in its own shape is an error, and so is a tensor of the
files that is no parameter, since engines and checkpoints know the weights by these names; only a tied head may be absent.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from grpo_worker.errors import DataError, one_line
from grpo_worker.model_files import weight_files

COMPUTED = "rotary_emb.inv_freq"  # in old checkpoints; made from the configuration


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have parameters without storage (device `meta`), and real buffers: rotary frequencies and the
    like are computed, not loaded."""
    modules: Any = nn.Module
    memory: Any = torch.utils.deterministic
    register, fills = modules.register_parameter, memory.fill_uninitialized_memory

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    modules.register_parameter = register_empty
    memory.fill_uninitialized_memory = False  # what is never written takes no memory
    try:
        yield
    finally:
        modules.register_parameter, memory.fill_uninitialized_memory = register, fills


def load_shards(model: nn.Module, directory: Path, device: torch.device, prefix: str) -> None:
    """Fill `model`, sharded by `fully_shard` while it had no weights, on `device`. Parameter names less `prefix` are the files'.

    Raises DataError.
    """
    files = {name: path for path in weight_files(directory) for name in _names(path)}
    names: dict[nn.Parameter, list[str]] = {}  # a tied parameter has several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    held = {
        parameter: next((n for name in own if (n := name.removeprefix(prefix)) in files), "")
        for parameter, own in names.items()
    }
    if missing := next((own[0].removeprefix(prefix) for parameter, own in names.items() if not held[parameter]), None):
        raise DataError(
            f"model.path: {directory} holds no tensor {missing} (it has {len(files)}, the first "
            f"{min(files, default='none')}): its files store the weights in another form than the model has them, quantised, "
            "merged or under other names. Load and save it once with Transformers, or choose another model."
        )
    known = {name.removeprefix(prefix) for own in names.values() for name in own}
    if unknown := sorted(name for name in files if name not in known and not name.endswith(COMPUTED)):
        raise DataError(
            f"model.path: {directory} holds {len(unknown)} tensors that are no parameters of the model, the first {unknown[0]} (scales "
            "of quantised weights, a router's state, a head for drafting): the trainer would ignore them, and engines refuse weights "
            "without them. Choose a model without them."
        )
    state: dict[str, Tensor] = {}
    for parameter, own in names.items():
        state |= dict.fromkeys(own, _own_rows(parameter, files[held[parameter]], held[parameter], device))
    model.load_state_dict(state, strict=False, assign=True)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise DataError(
            f"model.path: {path} is not a readable safetensors file ({reason}). Copy the model again."
        ) from error


def _own_rows(parameter: nn.Parameter, path: Path, name: str, device: torch.device) -> nn.Parameter:
    """The shard of `parameter` from `path`, opened for it alone: pages of a file that stays mapped would add up to all of
    it. Raises DataError when the file has another shape.
    """
    empty: Any = parameter.data
    assert isinstance(empty, DTensor)
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        if tuple(part.get_shape()) != tuple(empty.shape):
            raise DataError(
                f"model.path: {name} has shape {tuple(part.get_shape())} in {path.name} and {tuple(empty.shape)} by config.json. "
                "They are of two models: copy the model again."
            )
        shape, offset = compute_local_shape_and_global_offset(empty.shape, empty.device_mesh, empty.placements)
        local = torch.empty(shape, dtype=empty.dtype, device=device)
        local.copy_(part[offset[0] : offset[0] + shape[0]])
    # As FSDP makes its own: `DTensor.from_local` would move an offloaded shard to the mesh's device.
    return nn.Parameter(DTensor(local, empty._spec, requires_grad=False), parameter.requires_grad)
