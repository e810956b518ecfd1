import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import FILES, fill, save

from grpo_worker.checkpoint import (
    CheckpointStorageError,
    CheckpointTransaction,
    find_resume,
    latest,
    list_checkpoints,
    remove_leftovers,
    transaction,
    verify,
)
from grpo_worker.errors import CheckpointDamagedError


def test_nothing_is_visible_before_the_commit(tmp_path: Path) -> None:
    with CheckpointTransaction(tmp_path, 0, 20) as saving:
        fill(saving.path)
        assert list_checkpoints(tmp_path) == [] and latest(tmp_path) is None
        saving.commit()
    assert list_checkpoints(tmp_path) == [saving.final_path] and latest(tmp_path) == saving.final_path
    verify(saving.final_path, deep=True)


def test_leaving_without_a_commit_removes_what_was_written(tmp_path: Path) -> None:
    save(tmp_path, 20)
    with CheckpointTransaction(tmp_path, 0, 40) as saving:
        fill(saving.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0_step_20", "latest"]


def test_a_commit_that_fails_leaves_the_root_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, 20)
    with CheckpointTransaction(tmp_path, 0, 40) as saving:
        fill(saving.path)
        with pytest.raises(CheckpointDamagedError, match="rank_7"):
            saving.commit({"state/rank_7": "xxh3:0123456789abcdef"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0_step_20", "latest"]
    assert latest(tmp_path) == tmp_path / "epoch_0_step_20"


def test_the_group_may_read_every_file_and_wider_modes_stay(tmp_path: Path) -> None:
    with CheckpointTransaction(tmp_path, 0, 20) as saving:
        fill(saving.path)
        (saving.path / "actor").chmod(0o2700)
        (saving.path / "actor/model.safetensors").chmod(0o600)
        (saving.path / "actor/config.json").chmod(0o664)
        saving.commit()
    mode = {path: stat.S_IMODE((saving.final_path / path).stat().st_mode) for path in FILES}
    assert mode["actor/model.safetensors"] == 0o640 and mode["actor/config.json"] == 0o664
    assert stat.S_IMODE((saving.final_path / "actor").stat().st_mode) == 0o2750
    assert stat.S_IMODE((saving.final_path / "manifest.json").stat().st_mode) & 0o640 == 0o640
    assert stat.S_IMODE(saving.final_path.stat().st_mode) & 0o750 == 0o750


def test_a_umask_does_not_take_the_group_out(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        checkpoint = save(tmp_path / "root", 20)
    finally:
        os.umask(before)
    for path in (checkpoint, *checkpoint.rglob("*")):
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) & wanted == wanted, path


def test_sequence_numbers_grow_over_saves_and_restarts(tmp_path: Path) -> None:
    sequences = []
    for step in (20, 40, 10):
        with CheckpointTransaction(tmp_path, 0, step, incarnation=2) as saving:
            fill(saving.path)
            sequences.append(saving.commit().sequence)
    assert sequences == [1, 2, 3]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_checkpoint_of_the_same_name_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    save(tmp_path, 20, files={"actor/old": b"old"})
    if not can_exchange:
        monkeypatch.setattr(transaction, "_exchange", lambda *_: False)
    save(tmp_path, 20, files={"actor/new": b"new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0_step_20", "latest"]
    assert [path.name for path in (tmp_path / "epoch_0_step_20/actor").iterdir()] == ["new"]


def test_leftovers_of_killed_saves_are_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 20)
    fill(tmp_path / ".tmp-epoch_0_step_40")
    fill(tmp_path / ".tmp-pruned-epoch_0_step_5")
    (tmp_path / ".tmp-latest").symlink_to("epoch_0_step_40")
    (tmp_path / ".tmp-preflight-abc").write_text("")
    (tmp_path / "mine").mkdir()
    removed = remove_leftovers(tmp_path)
    assert removed == [
        ".tmp-epoch_0_step_40", ".tmp-latest", ".tmp-preflight-abc", ".tmp-pruned-epoch_0_step_5",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0_step_20", "latest", "mine"]
    assert remove_leftovers(tmp_path / "none") == []


def test_a_replaced_checkpoint_whose_successor_never_came_is_put_back(tmp_path: Path) -> None:
    save(tmp_path, 20).rename(tmp_path / ".tmp-replaced-epoch_0_step_20")
    remove_leftovers(tmp_path)
    point = find_resume(tmp_path).point
    assert point is not None and point.step == 20


def test_a_leftover_of_the_same_step_does_not_stop_a_save(tmp_path: Path) -> None:
    fill(tmp_path / ".tmp-epoch_0_step_20", {"state/stale": b"from a killed run"})
    checkpoint = save(tmp_path, 20)
    assert not (checkpoint / "state/stale").exists()


def test_two_processes_cannot_save_the_same_step_at_once(tmp_path: Path) -> None:
    with (
        CheckpointTransaction(tmp_path, 0, 20),
        pytest.raises(CheckpointStorageError, match="another process is saving epoch_0_step_20"),
    ):
        CheckpointTransaction(tmp_path, 0, 20)


# Forks a process that saves steps 20, 40, 40 again and prunes, and that kills itself before its n-th system call on files (as
# Python's audit events report them); n grows by one until it gets through. The root is looked at after each death.
_KILLED_RUNS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoint_files import save
from grpo_worker.checkpoint import find_resume, latest, list_checkpoints, prune, remove_leftovers, verify

root, starts_empty = Path(sys.argv[2]), sys.argv[3] == "empty"

def run(left):
    def count(event, arguments):
        nonlocal left
        if event.partition(".")[0] in ("open", "os", "shutil", "fcntl"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    remove_leftovers(root)
    save(root, 20)
    save(root, 40)
    save(root, 40)
    prune(root, 1)

deaths, saved = 0, False
while True:
    child = os.fork()
    if child == 0:
        run(deaths + 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for checkpoint in list_checkpoints(root):
        verify(checkpoint, deep=True)
    if os.path.lexists(root / "latest"):
        assert latest(root) is not None, f"death {deaths}: latest names a missing checkpoint"
    point = find_resume(root).point
    assert point or not saved, f"death {deaths}: the checkpoint of an earlier run is gone"
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    deaths, saved = deaths + 1, point is not None
    if starts_empty:
        os.rename(root, root.with_name(f"killed_{deaths}")) if root.exists() else None
        saved = False
remove_leftovers(root)
print(deaths, *sorted(path.name for path in root.iterdir()))
"""


@pytest.mark.parametrize("root", ["empty", "left by the one before"])
def test_a_kill_at_any_point_leaves_whole_checkpoints_and_a_latest_that_exists(tmp_path: Path, root: str) -> None:
    command = [sys.executable, "-c", _KILLED_RUNS, str(Path(__file__).parent), str(tmp_path / "root"), root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    deaths, *left = done.stdout.split()
    assert int(deaths) > 100
    assert left == ["epoch_0_step_40", "latest"]
