import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from checkpoint_files import FILES, fill, save

from grpo_worker.checkpoint import checksum_file, read_manifest, verify, write_manifest
from grpo_worker.errors import CheckpointDamagedError, ConfigError


def test_the_manifest_lists_every_file_with_its_size_and_checksum(tmp_path: Path) -> None:
    fill(tmp_path)
    written = write_manifest(tmp_path, {}, epoch=1, step=40, sequence=7, incarnation=3, now=1234.5)
    manifest = read_manifest(tmp_path)
    assert manifest == written
    assert (manifest.epoch, manifest.step, manifest.sequence, manifest.incarnation, manifest.time) == (
        1,
        40,
        7,
        3,
        1234.5,
    )
    assert {path: (entry.size_bytes, entry.checksum) for path, entry in manifest.files.items()} == {
        path: (len(content), f"xxh3:{xxhash.xxh3_64_hexdigest(content)}") for path, content in FILES.items()
    }
    assert manifest.size_bytes == sum(map(len, FILES.values()))


def test_checksums_given_by_the_writers_are_kept(tmp_path: Path) -> None:
    """A fault between the writer's memory and the disk is then found, which hashing the file afterwards would bless."""
    fill(tmp_path)
    meant = f"xxh3:{xxhash.xxh3_64_hexdigest(b'what the writer meant')}"
    write_manifest(tmp_path, {"state/__0_0.distcp": meant}, epoch=0, step=1)
    with pytest.raises(CheckpointDamagedError, match=r"state/__0_0\.distcp: its content changed"):
        verify(tmp_path, deep=True)


def test_a_file_that_a_writer_reported_but_is_not_there_stops_the_save(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(CheckpointDamagedError, match=r"state/__1_0\.distcp: was reported as written and is missing"):
        write_manifest(tmp_path, {"state/__1_0.distcp": "xxh3:0000000000000000"}, epoch=0, step=1)
    assert not (tmp_path / "manifest.json").exists()


def test_a_whole_checkpoint_verifies_and_further_files_do_not_matter(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 20)
    (checkpoint / "notes.txt").write_text("my best run")
    verify(checkpoint, deep=True)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message", "found_shallow"),
    [
        (lambda file: os.truncate(file, 100), r"actor/model\.safetensors: 100 bytes, 10240 were saved", True),
        (lambda file: os.truncate(file, 0), r"actor/model\.safetensors: 0 bytes, 10240 were saved", True),
        (lambda file: os.truncate(file, 10241), r"actor/model\.safetensors: 10241 bytes, 10240 were saved", True),
        (lambda file: file.unlink(), r"actor/model\.safetensors: missing", True),
        (_flip, r"actor/model\.safetensors: its content changed", False),
    ],
    ids=["cut", "empty", "longer", "missing", "one bit"],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, damage: Callable[[Path], None], message: str, found_shallow: bool
) -> None:
    checkpoint = save(tmp_path, 20)
    damage(checkpoint / "actor/model.safetensors")
    with pytest.raises(CheckpointDamagedError, match=message):
        verify(checkpoint, deep=True)
    if found_shallow:
        with pytest.raises(CheckpointDamagedError, match=message):
            verify(checkpoint, deep=False)
    else:
        verify(checkpoint, deep=False)


def test_every_damaged_file_is_named_and_the_others_are_not(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 20)
    (checkpoint / "coordinator.json").unlink()
    _flip(checkpoint / "state/.metadata")
    with pytest.raises(CheckpointDamagedError) as caught:
        verify(checkpoint)
    assert "coordinator.json: missing; state/.metadata: its content changed" in str(caught.value)
    assert "actor" not in str(caught.value)


def test_only_a_part_can_be_verified(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 20)
    (checkpoint / "state/.metadata").unlink()
    verify(checkpoint, below="actor")
    with pytest.raises(CheckpointDamagedError, match=r"state/\.metadata"):
        verify(checkpoint, below="state")
    with pytest.raises(CheckpointDamagedError, match="the manifest lists no such file, and none below it"):
        verify(checkpoint, below="acto")


@pytest.mark.parametrize("length", [0, 1, 50, 300])
def test_a_cut_manifest_is_damage(tmp_path: Path, length: int) -> None:
    checkpoint = save(tmp_path, 20)
    os.truncate(checkpoint / "manifest.json", length)
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json is cut off or changed"):
        verify(checkpoint)


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"format_version": 1}', "\x00\x00", '{"format_version": "x"}']
)
def test_a_manifest_of_something_else_is_damage(tmp_path: Path, content: str) -> None:
    checkpoint = save(tmp_path, 20)
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json"):
        verify(checkpoint)


def test_a_changed_manifest_does_not_match_its_own_checksum(tmp_path: Path) -> None:
    file = save(tmp_path, 20) / "manifest.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "step": 2000}))
    with pytest.raises(CheckpointDamagedError, match="does not match its own checksum"):
        read_manifest(file.parent)


def test_a_manifest_of_a_newer_program_is_no_damage_but_refused(tmp_path: Path) -> None:
    file = save(tmp_path, 20) / "manifest.json"
    file.write_text(json.dumps({"format_version": 99, "layout": "all new"}))
    with pytest.raises(ConfigError, match=r"format version 99, this program reads up to 1"):
        verify(file.parent)


def test_a_missing_manifest_means_the_checkpoint_is_not_whole(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 20)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json is missing"):
        verify(checkpoint)


def test_the_checksum_of_a_large_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = os.urandom(9 * 1024 * 1024 + 7)
    (tmp_path / "large").write_bytes(content)
    assert checksum_file(tmp_path / "large") == f"xxh3:{xxhash.xxh3_64_hexdigest(content)}"
