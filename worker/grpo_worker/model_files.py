"""What a model directory says about itself, read from headers alone.

Invariant: no tensor is loaded and torch is not imported.
"""

import json
import math
import struct
from pathlib import Path


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
