"""Real file systems that are full, read-only or somebody else's."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import FILES, fill, save

from grpo_worker.checkpoint import (
    CheckpointStorageError,
    CheckpointTransaction,
    find_resume,
    latest,
    preflight,
    storage_errors,
)
from grpo_worker.errors import ConfigError, ExitCode, RetryableError

MIB = 1024**2


def _mount(target: Path, options: str) -> None:
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")


def _fill_the_disk(disk: Path) -> None:
    """As another user of the volume would."""
    with open(disk / "somebody_elses", "wb", buffering=0) as other, contextlib.suppress(OSError):
        while True:
            other.write(bytes(4096))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    target = tmp_path / "disk"
    _mount(target, "size=1m")
    yield target
    subprocess.run(["umount", str(target)], check=True, timeout=10)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "read_only"
    _mount(target, "size=1m,ro")
    yield target
    subprocess.run(["umount", str(target)], check=True, timeout=10)


def test_a_full_disk_says_what_to_do_and_keeps_the_last_whole_checkpoint(small_disk: Path) -> None:
    save(small_disk, 20)
    large = {**FILES, "actor/model.safetensors": bytes(2 * MIB)}
    with (
        pytest.raises(
            CheckpointStorageError, match=r"saving epoch_0_step_40 failed: No space left on device"
        ) as caught,
        CheckpointTransaction(small_disk, 0, 40) as saving,
        storage_errors(small_disk, "saving epoch_0_step_40"),
    ):
        fill(saving.path, large)
    assert "checkpoint.keepLast" in str(caught.value) and "GiB free" in str(caught.value)
    assert caught.value.exit_code == ExitCode.CONFIG
    point = find_resume(small_disk).point
    assert point is not None and point.step == 20
    assert sorted(path.name for path in small_disk.iterdir()) == ["epoch_0_step_20", "latest"]


def test_a_disk_that_fills_up_during_the_commit_leaves_no_half_checkpoint(small_disk: Path) -> None:
    save(small_disk, 20)
    with CheckpointTransaction(small_disk, 0, 40) as saving:
        fill(saving.path)
        _fill_the_disk(small_disk)
        with pytest.raises(CheckpointStorageError, match="No space left on device"):
            saving.commit()
    assert latest(small_disk) == small_disk / "epoch_0_step_20"
    assert not (small_disk / "epoch_0_step_40").exists() and not saving.path.exists()


def test_too_little_space_is_found_before_the_first_step(small_disk: Path) -> None:
    preflight(small_disk, MIB // 2)
    with pytest.raises(ConfigError, match=r"checkpoint\.path: .* has \S+ GiB free, and one checkpoint needs 30\.0 GiB"):
        preflight(small_disk, 30 * 1024**3)
    assert list(small_disk.iterdir()) == []


def test_a_read_only_file_system_is_found_before_the_first_step(read_only_disk: Path) -> None:
    for root in (read_only_disk, read_only_disk / "made" / "by" / "us"):
        with pytest.raises(CheckpointStorageError, match=r"checkpoint\.path: .*is on a read-only file system"):
            preflight(root, 0)


def test_a_save_to_a_read_only_file_system_says_so(read_only_disk: Path) -> None:
    with pytest.raises(CheckpointStorageError, match="read-only file system"):
        CheckpointTransaction(read_only_disk, 0, 20)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_path_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "checkpoints").write_text("oops")
    with pytest.raises(ConfigError, match=r"checkpoint\.path: .*checkpoints is a file\. Remove it"):
        preflight(tmp_path / "checkpoints" / below, 0)


def test_preflight_makes_the_directory_and_leaves_it_empty(tmp_path: Path) -> None:
    preflight(tmp_path / "a" / "b", 1)
    assert list((tmp_path / "a" / "b").iterdir()) == []


_PREFLIGHT_AS_NOBODY = """
import os, sys
from pathlib import Path
from grpo_worker.checkpoint import preflight
from grpo_worker.errors import ConfigError
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    preflight(Path(sys.argv[1]), 0)
except ConfigError as error:
    sys.exit(f"ConfigError: {error}")
"""


def test_a_directory_of_another_user_is_refused_with_the_user_named(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o755) if parent.stat().st_uid == os.geteuid() else None
    root = tmp_path / "checkpoints"
    root.mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    command = [sys.executable, "-c", _PREFLIGHT_AS_NOBODY, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "ConfigError: checkpoint.path: writing a test file in" in done.stderr
    assert "User 65534, group 65534 may not write there" in done.stderr and "fsGroup" in done.stderr


def test_an_error_that_may_pass_is_retryable(tmp_path: Path) -> None:
    with pytest.raises(RetryableError, match="Is the volume of"), storage_errors(tmp_path, "saving epoch_0_step_20"):
        raise OSError(116, "Stale file handle", str(tmp_path))


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage_errors(tmp_path, "saving epoch_0_step_20"):
        raise ZeroDivisionError
