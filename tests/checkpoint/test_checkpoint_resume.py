import os
import shutil
from pathlib import Path

import pytest
from checkpoint_files import FILES, save

from grpo_worker.checkpoint import find_resume
from grpo_worker.errors import CheckpointDamagedError, ConfigError


def _damage(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state/__0_0.distcp", 10)


@pytest.mark.parametrize("exists", [True, False])
def test_auto_without_checkpoints_starts_anew(tmp_path: Path, exists: bool) -> None:
    root = tmp_path if exists else tmp_path / "none"
    decision = find_resume(root, "auto")
    assert decision.point is None and decision.skipped == ()


def test_auto_takes_the_newest(tmp_path: Path) -> None:
    for step in (20, 40, 100):
        save(tmp_path, step, epoch=step // 50)
    point = find_resume(tmp_path, "auto").point
    assert point is not None
    assert (point.epoch, point.step, point.path) == (2, 100, tmp_path / "epoch_2_step_100")
    assert point.actor.is_dir() and point.state.is_dir() and point.coordinator_file.is_file()


def test_auto_falls_back_to_the_previous_one_and_says_why(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        save(tmp_path, step)
    _damage(tmp_path / "epoch_0_step_60")
    (tmp_path / "epoch_0_step_40" / "manifest.json").unlink()
    decision = find_resume(tmp_path, "auto")
    assert decision.point is not None and decision.point.step == 20
    assert sorted(skipped.path.name for skipped in decision.skipped) == ["epoch_0_step_40", "epoch_0_step_60"]
    reasons = {skipped.path.name: skipped.reason for skipped in decision.skipped}
    assert "state/__0_0.distcp: 10 bytes, 1500 were saved" in reasons["epoch_0_step_60"]
    assert "manifest.json is missing" in reasons["epoch_0_step_40"]


def test_auto_never_falls_back_to_nothing(tmp_path: Path) -> None:
    for step in (20, 40):
        _damage(save(tmp_path, step))
    with pytest.raises(CheckpointDamagedError) as caught:
        find_resume(tmp_path, "auto")
    assert "2 damaged" in str(caught.value) and "checkpoint.resume: never" in str(caught.value)
    assert "epoch_0_step_20" in str(caught.value) and "epoch_0_step_40" in str(caught.value)


def test_never_does_not_even_look(tmp_path: Path) -> None:
    _damage(save(tmp_path, 20))
    assert find_resume(tmp_path, "never").point is None


def test_a_run_that_started_anew_in_the_same_root_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    """The older run got further: by step number its checkpoint would win."""
    save(tmp_path, 100)
    save(tmp_path, 20)
    point = find_resume(tmp_path, "auto").point
    assert point is not None and point.step == 20


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 20)
    save(tmp_path, 20, files={**FILES, "coordinator.json": b"second"})
    point = find_resume(tmp_path, "auto").point
    assert point is not None and point.coordinator_file.read_bytes() == b"second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0_step_20", "latest"]


def test_a_directory_without_latest_resumes_as_well(tmp_path: Path) -> None:
    """Killed between the rename and `latest`, or copied by a tool that drops links."""
    save(tmp_path, 20)
    (tmp_path / "latest").unlink()
    point = find_resume(tmp_path, "auto").point
    assert point is not None and point.step == 20


@pytest.mark.parametrize("how", ["absolute", "name", "relative", "latest"])
def test_a_path_names_one_checkpoint(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    save(root, 20)
    save(root, 40)
    monkeypatch.chdir(tmp_path)
    mode = {"absolute": f"{root}/epoch_0_step_20", "name": "epoch_0_step_20", "relative": "root/epoch_0_step_20"}
    point = find_resume(root, mode.get(how, "latest")).point
    assert point is not None and point.step == (40 if how == "latest" else 20)


def test_a_named_checkpoint_that_is_damaged_has_no_fallback(tmp_path: Path) -> None:
    save(tmp_path, 20)
    _damage(save(tmp_path, 40))
    with pytest.raises(CheckpointDamagedError, match="epoch_0_step_40"):
        find_resume(tmp_path, "epoch_0_step_40")


def test_a_named_checkpoint_that_does_not_exist_lists_those_that_do(tmp_path: Path) -> None:
    save(tmp_path, 20)
    with pytest.raises(ConfigError, match=r"no checkpoint epoch_0_step_30 \(checkpoints in .*: epoch_0_step_20\)"):
        find_resume(tmp_path, "epoch_0_step_30")


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, 20).rename(tmp_path / "epoch_0_step_500")
    with pytest.raises(CheckpointDamagedError, match="its manifest is of epoch 0, step 20"):
        find_resume(tmp_path, "auto")


def test_a_copied_root_resumes(tmp_path: Path) -> None:
    save(tmp_path / "a", 20)
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    point = find_resume(tmp_path / "b", "auto").point
    assert point is not None and point.path == tmp_path / "b" / "epoch_0_step_20"
