"""metrics.jsonl, ledger.jsonl and samples.jsonl: after a resume they hold nothing of a later step, and nothing is lost by that."""

import json
from pathlib import Path

import pytest

from grpo_worker.metric_loggers import StepFile, set_aside


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def written(path: Path, *numbers: int) -> Path:
    path.write_text("".join(json.dumps({"step": number, "trained": [f"u{number}"]}) + "\n" for number in numbers))
    return path


@pytest.mark.parametrize(
    ("resume_step", "kept", "moved"),
    [
        (-1, [], [0, 1, 2, 2, 3]),
        (0, [0], [1, 2, 2, 3]),
        (2, [0, 1, 2, 2], [3]),
        (3, [0, 1, 2, 2, 3], None),
        (9, [0, 1, 2, 2, 3], None),
    ],
)
def test_lines_after_the_resumed_step_are_set_aside(
    tmp_path: Path, resume_step: int, kept: list[int], moved: list[int] | None
) -> None:
    path = written(tmp_path / "ledger.jsonl", 0, 1, 2, 2, 3)
    lost = set_aside([path], resume_step)
    assert steps(path) == kept
    if moved is None:
        assert lost is None
        assert [file.name for file in tmp_path.iterdir()] == ["ledger.jsonl"]
    else:
        assert lost is not None
        assert (lost.first, lost.last) == (moved[0], moved[-1])
        assert [file.name for file in lost.files] == ["ledger.1.jsonl"]
        assert steps(tmp_path / "ledger.1.jsonl") == moved


def test_files_of_one_start_have_one_number_and_no_earlier_one_is_overwritten(tmp_path: Path) -> None:
    ledger, samples = written(tmp_path / "ledger.jsonl", 1, 2), written(tmp_path / "samples.jsonl", 1)
    for number in (1, 2):
        written(samples, 1)
        lost = set_aside([tmp_path / "metrics.jsonl", ledger, samples], -1)
        assert lost is not None
        assert lost.files[-1] == tmp_path / f"samples.{number}.jsonl"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ledger.1.jsonl", "ledger.jsonl", "samples.1.jsonl", "samples.2.jsonl", "samples.jsonl",
    ]  # fmt: skip
    assert steps(tmp_path / "ledger.1.jsonl") == [1, 2]


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "trai', '{"step": 3}', "\x00\x00", "not json\n", '{"trained": []}\n', "[1]\n"]
)
def test_a_line_that_a_kill_tore_is_dropped(tmp_path: Path, torn: str) -> None:
    path = written(tmp_path / "ledger.jsonl", 1, 2)
    with path.open("a") as file:
        file.write(torn)
    assert set_aside([path], 5) is None
    assert steps(path) == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.jsonl"]


def test_a_line_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    records = StepFile(path)
    records.write(4, {"response": "żółć\n\ud800", "score": 1.0})
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line)["step"] == 4
    assert "żółć" in line.decode()
    records.close()
    again = StepFile(path)
    again.write(5, {})
    again.close()
    assert steps(path) == [4, 5]


def test_a_file_that_is_bounded_loses_its_oldest_lines_and_takes_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    records = StepFile(path, keep_bytes=1000)
    for step in range(200):
        records.write(step, {"word": "x" * 20})
        assert path.stat().st_size <= 1000
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(steps[0], 200)) and len(steps) > 8
    records.write(199, {"word": "again"}, anew=True)
    records.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 199, "word": "again"}
