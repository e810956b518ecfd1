"""What a snapshot of weights consists of, and the proof that two of them are the same.

Invariant: `digest` depends on names, shapes, dtypes, places and checksums, and on nothing else: equal weights have
equal digests, whatever their version. A manifest that differs from what the engine's model needs in any name, shape or
dtype is refused as a whole, because vLLM itself does not report tensors that are missing.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec
import xxhash

from grpo_worker.errors import DataError, PeerLostError, RetryableError
from grpo_worker.model_files import CONFIG_FILE, tensor_headers

ALIGNMENT_BYTES = 64  # of each tensor in the buffer: any dtype may be viewed in place

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class WeightsMismatchError(DataError):
    """The published tensors are not the ones that the engine's model needs."""

    reason = "WeightsMismatch"


class WeightsDamagedError(PeerLostError):
    """Bytes arrived that are not the bytes that were published."""

    reason = "WeightsDamaged"


class VersionNotHeldError(RetryableError):
    """The trainer has moved on: ask for the version that is current now."""

    reason = "VersionNotHeld"


class TensorSpec(msgspec.Struct, array_like=True, frozen=True):
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        if self.dtype not in DTYPE_BYTES:
            raise DataError(f"{self.name}: dtype '{self.dtype}' cannot be published (known: {', '.join(DTYPE_BYTES)})")
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class TensorEntry(msgspec.Struct, array_like=True, frozen=True):
    """One tensor of a snapshot: bytes [offset, offset + size_bytes) of the buffer, little-endian, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size_bytes: int
    checksum: int  # xxh3_64 of the bytes


class SnapshotManifest(msgspec.Struct, frozen=True):
    version: int
    total_bytes: int
    tensors: list[TensorEntry]

    @property
    def digest(self) -> str:
        """xxh3_128 over the canonical msgpack of the tensors, as hexadecimal."""
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(self.tensors))


def layout(specs: Iterable[TensorSpec]) -> tuple[list[int], int]:
    """Offset of each tensor in one contiguous buffer, in the given order, and the buffer's size in bytes."""
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        end += math.ceil(spec.size_bytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end


def check_places(manifest: SnapshotManifest) -> None:
    """Refuse a manifest whose tensors do not lie where `layout` puts them (it came over a network).

    Raises:
        WeightsDamagedError: naming the tensor.
    """
    offsets, total = layout(TensorSpec(entry.name, entry.shape, entry.dtype) for entry in manifest.tensors)
    for entry, offset in zip(manifest.tensors, offsets, strict=True):
        spec = TensorSpec(entry.name, entry.shape, entry.dtype)
        if (entry.offset, entry.size_bytes) != (offset, spec.size_bytes):
            raise WeightsDamagedError(
                f"manifest of version {manifest.version}: {entry.name} is at {entry.offset} with {entry.size_bytes} bytes, "
                f"must be at {offset} with {spec.size_bytes}"
            )
    if manifest.total_bytes != total:
        raise WeightsDamagedError(
            f"manifest of version {manifest.version}: {manifest.total_bytes} bytes in all, must be {total}"
        )


def verify(
    manifest: SnapshotManifest,
    expected: Mapping[str, TensorSpec],
    *,
    optional: Collection[str] = (),
    dtypes: Collection[str] | None = None,
) -> None:
    """Compare a snapshot with the tensors that the engine's model is made of.

    Args:
        manifest: what the trainer published.
        expected: name to shape and dtype, from the model directory (`expected_tensors`).
        optional: names that may be absent on either side (a tied output head).
        dtypes: dtypes accepted beside the expected one (the engine casts when it loads); None accepts only the expected
            one.

    Raises:
        WeightsMismatchError: with every difference by name (the first few of each kind).
    """
    published = {entry.name: entry for entry in manifest.tensors}
    duplicates = len(manifest.tensors) - len(published)
    missing = [name for name in expected if name not in published and name not in optional]
    unexpected = [name for name in published if name not in expected and name not in optional]
    wrong_shape, wrong_dtype = [], []
    for name, entry in published.items():
        if (spec := expected.get(name)) is None:
            continue
        if tuple(entry.shape) != tuple(spec.shape):
            wrong_shape.append(f"{name} {list(entry.shape)}, needs {list(spec.shape)}")
        if entry.dtype != spec.dtype and entry.dtype not in (dtypes or ()):
            wrong_dtype.append(f"{name} {entry.dtype}, needs {' or '.join(sorted({spec.dtype, *(dtypes or ())}))}")
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong_shape, "wrong dtype": wrong_dtype}
    problems = [f"{kind}: {_some(names)}" for kind, names in found.items() if names]
    if duplicates:
        problems.append(f"{duplicates} names occur twice")
    if problems:
        raise WeightsMismatchError(
            f"weights of version {manifest.version} do not fit the engine's model: {'; '.join(problems)}. "
            "The engine keeps its old weights. Publish under the checkpoint's names (Hugging Face format), all of them."
        )


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def expected_tensors(model_directory: Path) -> tuple[dict[str, TensorSpec], frozenset[str]]:
    """Names, shapes and dtypes of a Hugging Face model directory, from the headers of its safetensors files (no weights
    are read).

    Returns:
        The tensors, and the names that may be absent: `lm_head.weight` when the configuration ties it to the embedding,
        and rotary buffers that old checkpoints carry.

    Raises:
        DataError: no safetensors file, or one that cannot be read.
    """
    tensors = {
        name: TensorSpec(name, shape, _SAFETENSORS_DTYPES.get(dtype, dtype))
        for name, shape, dtype in tensor_headers(model_directory)
    }
    optional = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    config = model_directory / CONFIG_FILE
    if config.exists() and json.loads(config.read_text()).get("tie_word_embeddings", False):
        optional.add("lm_head.weight")
    return tensors, frozenset(optional)
