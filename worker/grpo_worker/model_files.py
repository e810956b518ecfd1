"""What a model directory consists of, and what it says about itself, read from names and headers alone.

Invariant: no tensor is loaded and torch is not imported.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
TEMPLATES_FOLDER = "additional_chat_templates"
# Beside the weights: tokenizers, chat templates, generation_config.json, processors, custom code, the licence. Named by kind,
# so a directory that also holds data or other people's checkpoints is not copied with them.
SMALL_FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.py", "*.md", "tokenizer*", "LICEN[CS]E*",
    "NOTICE*",
)  # fmt: skip


def files_beside_weights(directory: Path) -> Iterator[Path]:
    """What a copy of the model needs beside config.json and the weights with their index, relative to `directory`."""
    for folder, patterns in ((directory, SMALL_FILES), (directory / TEMPLATES_FOLDER, ("*.jinja",))):
        names = {path for pattern in patterns for path in folder.glob(pattern)}
        for path in sorted(names):
            written_anew = (
                path.name == CONFIG_FILE or path.name.endswith(".index.json") or path.suffix == ".safetensors"
            )
            if path.is_file() and not written_anew:
                yield path.relative_to(directory)


def parameter_count(path: str) -> int | None:
    """Parameters in a directory's safetensors files; None when the path is not such a directory (a hub id, other formats)."""
    directory = Path(path).expanduser()
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not files:
        return None
    return sum(
        math.prod(tensor["shape"]) for file in files for name, tensor in _header(file).items() if name != "__metadata__"
    )


def _header(file: Path) -> dict[str, dict[str, list[int]]]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, dict[str, list[int]]] = json.loads(stream.read(length))
    return header
