"""The manifest is compared strictly with the model that the engine runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grpo_worker.errors import DataError
from grpo_worker.weightsync.manifest import (
    SnapshotManifest,
    TensorEntry,
    TensorSpec,
    WeightsDamagedError,
    WeightsMismatchError,
    check_places,
    expected_tensors,
    layout,
    verify,
)  # fmt: skip

EXPECTED = {name: TensorSpec(name, (2, 3), "bfloat16") for name in ("embed", "q_proj", "k_proj")}


def manifest(**changes: TensorSpec | None) -> SnapshotManifest:
    """A manifest of the expected tensors, with some replaced, added or (None) left out."""
    specs = [spec for spec in {**EXPECTED, **changes}.values() if spec is not None]
    offsets, total = layout(specs)
    entries = [
        TensorEntry(s.name, s.shape, s.dtype, offset, s.size_bytes, 0) for s, offset in zip(specs, offsets, strict=True)
    ]
    return SnapshotManifest(7, total, entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_proj": None}, "missing: k_proj"),
        ({"v_proj": TensorSpec("v_proj", (2, 3), "bfloat16")}, "unexpected: v_proj"),
        ({"q_proj": TensorSpec("q_proj", (3, 2), "bfloat16")}, r"wrong shape: q_proj \[3, 2\], needs \[2, 3\]"),
        ({"q_proj": TensorSpec("q_proj", (2, 3), "float16")}, "wrong dtype: q_proj float16, needs bfloat16 or float32"),
    ],
)
def test_every_difference_is_refused_by_name(changes: dict[str, TensorSpec | None], message: str) -> None:
    with pytest.raises(WeightsMismatchError, match=message):
        verify(manifest(**changes), EXPECTED, dtypes={"float32"})


def test_the_expected_tensors_pass() -> None:
    verify(manifest(), EXPECTED)
    verify(manifest(embed=TensorSpec("embed", (2, 3), "float32")), EXPECTED, dtypes={"float32"})


def test_all_differences_are_told_at_once() -> None:
    changes = {"embed": None, "extra": TensorSpec("extra", (1,), "float32")}
    with pytest.raises(WeightsMismatchError, match=r"version 7.*missing: embed; unexpected: extra"):
        verify(manifest(**changes), EXPECTED)


@pytest.mark.parametrize("head", [None, TensorSpec("lm_head.weight", (2, 3), "bfloat16")])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_tied_head_may_be_published_or_not(head: TensorSpec | None, on_disk: bool) -> None:
    expected = {**EXPECTED, "lm_head.weight": TensorSpec("lm_head.weight", (2, 3), "bfloat16")} if on_disk else EXPECTED
    verify(manifest(**{"lm_head.weight": head}), expected, optional={"lm_head.weight"})


def test_expected_tensors_are_read_from_the_headers(tmp_path: Path) -> None:
    save_file({"embed": torch.zeros(4, 2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file({"head": torch.zeros(3)}, tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    tensors, optional = expected_tensors(tmp_path)
    assert tensors == {"embed": TensorSpec("embed", (4, 2), "bfloat16"), "head": TensorSpec("head", (3,), "float32")}
    assert optional == {"lm_head.weight"}


def test_only_the_files_of_the_index_count(tmp_path: Path) -> None:
    save_file({"embed": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"stray": torch.zeros(2)}, tmp_path / "stray.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed": "model-1.safetensors"}}))
    assert list(expected_tensors(tmp_path)[0]) == ["embed"]


def test_a_directory_without_weights_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="safe_serialization"):
        expected_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00")
    with pytest.raises(DataError, match=r"model.safetensors is not a readable safetensors file"):
        expected_tensors(tmp_path)


def test_a_manifest_whose_tensors_overlap_is_refused() -> None:
    good = manifest()
    entry = good.tensors[1]
    moved = TensorEntry(entry.name, entry.shape, entry.dtype, 0, entry.size_bytes, 0)
    with pytest.raises(WeightsDamagedError, match="q_proj is at 0"):
        check_places(SnapshotManifest(7, good.total_bytes, [good.tensors[0], moved, good.tensors[2]]))


def test_the_digest_sees_every_field_but_the_version() -> None:
    base = manifest()
    assert SnapshotManifest(8, base.total_bytes, base.tensors).digest == base.digest
    for change in (
        {"embed": TensorSpec("embed", (3, 2), "bfloat16")},
        {"embed": TensorSpec("embed", (2, 3), "float16")},
        {"embed": TensorSpec("Embed", (2, 3), "bfloat16")},
    ):
        assert manifest(**change).digest != base.digest
