"""The coordinator's half of a checkpoint (`coordinator.json`), and what may have changed in the document when a run goes on from it.

Invariant: what may not change is compared with what the checkpoint says, and refused with the field and both values: the data
(`BlockDataset.restore`) and the model that training began with, whose tokenizer gave the prompts their tokens and which the KL terms hold
on to. Everything else may change and holds from the next step on; docs/operations.md has the table.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_worker.errors import DataError
from grpo_worker.model_files import weight_files

DESCRIBING_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class RunState:
    """The run after `step` steps. `epoch` is whole ones; `updates` counts the optimizer's, the skipped ones included."""

    epoch: int
    step: int
    updates: int
    model: dict[str, Any]
    data: dict[str, Any]
    kl_controller: dict[str, float]
    in_flight: list[str]  # uids; generated again after a resume


def describe_model(path: str, revision: str | None, directory: Path) -> dict[str, Any]:
    """What tells one starting model from another, without reading its weights."""
    files = [directory / name for name in DESCRIBING_FILES if (directory / name).is_file()]
    return {
        "path": path,
        "revision": revision,
        "files": {file.name: zlib.crc32(file.read_bytes()) for file in files},
        "weight_bytes": sum(file.stat().st_size for file in weight_files(directory)),
    }


def check_same_model(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises DataError. A directory may have moved: its contents count."""
    names = [f"{model['path']}" + (f"@{model['revision']}" if model["revision"] else "") for model in (saved, now)]
    differing = [
        name for name in sorted({*saved["files"], *now["files"]}) if saved["files"].get(name) != now["files"].get(name)
    ]
    if saved["weight_bytes"] != now["weight_bytes"]:
        differing.append(f"the weights ({saved['weight_bytes']} bytes then, {now['weight_bytes']} now)")
    if differing:
        raise DataError(
            f"model.path: the checkpoint's run began with {names[0]}, this document says {names[1]}, and they differ in "
            f"{', '.join(differing)}. Restore the model, or start a new run from the checkpoint's actor/ directory as model.path."
        )
