import os
from pathlib import Path

import pytest
from checkpoint_files import save

from grpo_worker.checkpoint import CheckpointTransaction, list_checkpoints, prune, remove_leftovers
from grpo_worker.checkpoint.layout import CheckpointName, set_latest
from grpo_worker.checkpoint.prune import to_remove


@pytest.mark.parametrize(
    ("newest_first", "kept", "keep", "removed"),
    [
        (["e", "d", "c", "b", "a"], {"e"}, 3, ["b", "a"]),
        (["e", "d", "c"], {"e"}, 3, []),
        (["e", "d"], {"e"}, 3, []),
        ([], {}, 1, []),
        (["e", "d", "c"], {"e"}, 1, ["d", "c"]),
        (["e", "d", "c"], {"c"}, 1, ["d"]),
        (["e", "d", "c", "b"], {"e", "c"}, 1, ["d", "b"]),
        (["e", "d", "c"], {}, 1, ["d", "c"]),
    ],
)
def test_all_but_the_last_go_and_never_one_that_is_named(
    newest_first: list[str], kept: set[str], keep: int, removed: list[str]
) -> None:
    assert to_remove(newest_first, kept, keep) == removed


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_last 0"):
        to_remove(["a"], {"a"}, 0)


def test_prune_removes_the_oldest_saves(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    removed = prune(tmp_path, 2)
    assert [path.name for path in removed] == ["epoch_0_step_10", "epoch_0_step_5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0_step_100", "epoch_0_step_15", "latest"]


def test_damaged_checkpoints_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (20, 40, 60, 80):
        save(tmp_path, step)
    os.truncate(tmp_path / "epoch_0_step_60/actor/config.json", 1)
    (tmp_path / "epoch_0_step_20/manifest.json").unlink()
    assert prune(tmp_path, 2) == []
    assert len(list_checkpoints(tmp_path)) == 4


def test_the_checkpoint_that_latest_names_stays(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        save(tmp_path, step)
    set_latest(tmp_path, CheckpointName(0, 20))
    assert [path.name for path in prune(tmp_path, 1)] == ["epoch_0_step_40"]


@pytest.mark.parametrize("how", ["name", "absolute", "another root"])
def test_the_checkpoint_that_the_document_names_stays(tmp_path: Path, how: str) -> None:
    root = tmp_path / "root"
    for step in (20, 40, 60):
        save(root, step)
    elsewhere = save(tmp_path / "elsewhere", 20)
    named = {"name": "epoch_0_step_20", "absolute": str(root / "epoch_0_step_20"), "another root": str(elsewhere)}
    removed = [path.name for path in prune(root, 1, named[how])]
    assert removed == ["epoch_0_step_40", *(["epoch_0_step_20"] if how == "another root" else [])]
    assert elsewhere.is_dir()


def test_a_save_under_way_and_a_persons_files_stay(tmp_path: Path) -> None:
    for step in (20, 40):
        save(tmp_path, step)
    (tmp_path / "best").mkdir()
    with CheckpointTransaction(tmp_path, 0, 60) as transaction:
        prune(tmp_path, 1)
        assert remove_leftovers(tmp_path) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".tmp-epoch_0_step_60", "best", "epoch_0_step_40", "latest",
        ]  # fmt: skip
        transaction.abort()
