from pathlib import Path

import pytest
from checkpoint_files import save

from grpo_worker.checkpoint import CheckpointName, latest, layout, list_checkpoints


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("epoch_0_step_20", CheckpointName(0, 20)),
        ("epoch_12_step_34567", CheckpointName(12, 34567)),
        ("epoch_0_step_0", CheckpointName(0, 0)),
        ("epoch_00_step_20", None),
        ("epoch_0_step_", None),
        ("epoch_0_step_20.bak", None),
        (".tmp-epoch_0_step_20", None),
        ("epoch_-1_step_20", None),
        ("epoch_1_step_\u0664", None),
        ("latest", None),
    ],
)
def test_only_the_exact_name_is_a_checkpoints_name(text: str, name: CheckpointName | None) -> None:
    assert CheckpointName.parse(text) == name


def test_a_name_reads_back_as_itself() -> None:
    assert CheckpointName.parse(str(CheckpointName(3, 140))) == CheckpointName(3, 140)


def test_checkpoints_are_listed_by_step_as_a_number_and_the_highest_first(tmp_path: Path) -> None:
    for name in ("epoch_0_step_9", "epoch_1_step_100", "epoch_0_step_20", ".tmp-epoch_1_step_120", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "epoch_0_step_30").write_text("a file, not a checkpoint")
    (tmp_path / "epoch_0_step_40").symlink_to("epoch_0_step_9")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "epoch_1_step_100",
        "epoch_0_step_20",
        "epoch_0_step_9",
    ]


def test_a_root_that_does_not_exist_has_no_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == [] and latest(tmp_path / "none") is None


def test_latest_is_relative_so_a_moved_root_still_works(tmp_path: Path) -> None:
    save(tmp_path / "here", 20)
    (tmp_path / "here").rename(tmp_path / "there")
    assert latest(tmp_path / "there") == tmp_path / "there" / "epoch_0_step_20"


def test_latest_may_be_a_file_where_links_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(layout.os, "symlink", refuse)
    save(tmp_path, 20)
    save(tmp_path, 40)
    assert not (tmp_path / "latest").is_symlink()
    assert latest(tmp_path) == tmp_path / "epoch_0_step_40"


@pytest.mark.parametrize("target", ["epoch_0_step_20", "../elsewhere", ""])
def test_a_latest_that_names_no_checkpoint_here_counts_as_none(tmp_path: Path, target: str) -> None:
    (tmp_path / "latest").write_text(target)
    assert latest(tmp_path) is None
