"""After a resume the records hold nothing of a later step."""

import json
from pathlib import Path

import pytest

from grpo_worker.coordinator.records import StepRecords


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def written(path: Path, *numbers: int) -> None:
    path.write_text("".join(json.dumps({"step": number, "trained": [f"u{number}"]}) + "\n" for number in numbers))


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2, 2]), (3, [0, 1, 2, 2, 3]), (9, [0, 1, 2, 2, 3])]
)
def test_lines_after_the_resumed_step_are_cut_off(tmp_path: Path, resume_step: int, kept: list[int]) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path, 0, 1, 2, 2, 3)
    StepRecords(path, resume_step).close()
    assert steps(path) == kept
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 2, "trai', "not json\n", '{"trained": []}\n', "[1]\n", "{}\n"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path, 1, 2)
    with path.open("a") as file:
        file.write(torn)
    StepRecords(path, 5).close()
    assert steps(path) == [1, 2]


def test_a_line_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    records = StepRecords(path, -1)
    records.write(4, {"response": "żółć\n\ud800", "score": 1.0})
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line)["step"] == 4
    assert "żółć" in line.decode()
    records.close()
    again = StepRecords(path, 4)
    again.write(5, {})
    again.close()
    assert steps(path) == [4, 5]
