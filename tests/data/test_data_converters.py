"""GSM8K and reasoning-gym to Parquet."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_worker.data import DataOptions, PromptDataset, PromptEncoder, convert_gsm8k, make_reasoning_gym, open_files
from grpo_worker.data.gsm8k import final_number
from grpo_worker.errors import ConfigError, DataError, UsageError

GSM8K = [
    {
        "question": f"A baker fills {n} trays with 12 rolls each. How many rolls are there?",
        "answer": f"Each tray has 12 rolls, so there are {n}*12=<<{n}*12={n * 12}>>{n * 12} rolls.\n#### {n * 12:,}",
    }
    for n in range(1, 201)
]


@pytest.fixture(params=["jsonl", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"gsm8k.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    else:
        pq.write_table(pa.Table.from_pylist(GSM8K), path)
    return path


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so\n#### 42", "42"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### $1,000.50", "1000.5"),
        ("#### -$5", "-5"),
        ("#### .5", "0.5"),
        ("#### 18.", "18"),
        ("#### 1\n#### 2", "2"),
        ("#### 1\n#### none", None),
        ("42", None),
        ("####", None),
        ("#### 3/4", "0.75"),
        ("#### 1/3", "1/3"),
        ("#### 1 1/2", "1.5"),
        ("#### 1 000", "1000"),
        ("#### 1.5e3", "1500"),
        ("#### 70{,}000", "70000"),
        ("#### +3", "3"),
        ("#### 12 apples", "12"),
        ("#### 10:30", None),
        ("#### 12 or 13", None),
        ("#### 1,2", None),
    ],
)
def test_the_ground_truth_is_the_number_after_the_last_marker(answer: str, number: str | None) -> None:
    assert final_number(answer) == number


def test_gsm8k_for_training_has_no_response_and_for_test_the_full_answer(source: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        output = tmp_path / "out" / f"{split}.parquet"
        assert convert_gsm8k([source], output, split, "Think.", 7).rows == 200  # type: ignore[arg-type]
        rows = pq.read_table(output).to_pylist()
        assert list(rows[0]) == ["prompt", "response", "reward", "split", "index"]
        assert sorted(row["index"] for row in rows) == list(range(200)) != [row["index"] for row in rows]
        for row in rows:
            origin = GSM8K[row["index"]]
            assert row["prompt"] == origin["question"] + "\nThink."
            assert row["response"] == (origin["answer"] if split == "test" else "")
            assert row["reward"] == str((row["index"] + 1) * 12)


def test_converted_files_load(source: Path, tmp_path: Path, plain_tokenizer: Any) -> None:
    output = tmp_path / "train.parquet"
    convert_gsm8k([source], output, "train", None, 0)
    options = DataOptions()
    assert PromptDataset(open_files([output], options), options, PromptEncoder(plain_tokenizer, 200)).scan().kept == 200


def test_the_file_depends_on_the_seed_alone(source: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.parquet" for n in range(3)]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        convert_gsm8k([source], path, "train", None, seed)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (
            [GSM8K[0], {"question": "a", "answer": "five"}],
            "row 1 has not one number after '####' in its answer ('five')",
        ),
        ([{"Question": "a", "answer": "#### 1"}], "row 0 has no 'question' (it has Question, answer)"),
        ([{"question": "", "answer": "#### 1"}], "row 0 has no text in 'question'"),
        ([3], "row 0 is a int, not an object"),
        ([], "no rows"),
    ],
)
def test_a_bad_gsm8k_row_is_named_and_nothing_is_written(tmp_path: Path, lines: list[Any], part: str) -> None:
    path, output = tmp_path / "bad.jsonl", tmp_path / "out.parquet"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError) as caught:
        convert_gsm8k([path], output, "train")
    assert str(path) in str(caught.value) and part in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GSM8K[0]) + "\n{oops\n")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        convert_gsm8k([path], tmp_path / "out.parquet", "train")
    with pytest.raises(DataError, match="cannot be read as Parquet or JSON Lines: No such file"):
        convert_gsm8k([tmp_path / "none.jsonl"], tmp_path / "out.parquet", "train")


def test_an_existing_file_is_kept_unless_overwriting_is_asked(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    output.write_text("precious")
    with pytest.raises(UsageError, match=r"out.parquet exists"):
        convert_gsm8k([source], output, "train")
    with pytest.raises(UsageError, match=r"out.parquet exists"):
        make_reasoning_gym("simple_equations", 1, 0, output)
    assert output.read_text() == "precious"
    convert_gsm8k([source], output, "train", overwrite=True)
    assert pq.read_metadata(output).num_rows == 200
    with pytest.raises(UsageError, match="is a directory"):
        convert_gsm8k([source], tmp_path, "train", overwrite=True)


def test_a_place_that_cannot_be_written_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        convert_gsm8k([source], source / "below-a-file.parquet", "train")


def test_reasoning_gym_problems_keep_their_entry_for_the_verifier(tmp_path: Path) -> None:
    import reasoning_gym

    output = tmp_path / "test.parquet"
    make_reasoning_gym("simple_equations", 20, 3, output, {"max_terms": 3}, "test")
    rows = pq.read_table(output).to_pylist()
    assert list(rows[0]) == ["prompt", "response", "reward", "task", "entry"] and len(rows) == 20
    dataset = reasoning_gym.create_dataset("simple_equations", size=20, seed=3, max_terms=3)
    assert sorted(row["prompt"] for row in rows) == sorted(entry["question"] for entry in dataset)
    for row in rows:
        entry = json.loads(row["entry"])
        assert row["response"] == row["reward"] == entry["answer"]
        assert dataset.score_answer(row["reward"], entry) == 1.0
    again = tmp_path / "train.parquet"
    make_reasoning_gym("simple_equations", 20, 3, again, {"max_terms": 3})
    assert {row["response"] for row in pq.read_table(again).to_pylist()} == {""}


@pytest.mark.parametrize(
    ("task", "size", "config", "part"),
    [
        ("simple_equation", 1, {}, "reasoning-gym has no task 'simple_equation'. Did you mean simple_equations"),
        ("zzzzzz", 1, {}, "such as basic_arithmetic"),
        ("simple_equations", 0, {}, "size 0 is less than 1"),
        ("simple_equations", 1, {"max_term": 3}, "has no parameter 'max_term'. Did you mean 'max_terms'?"),
        ("simple_equations", 1, {"min_terms": 30}, "refuses its parameters: max_terms must be >= min_terms"),
    ],
)
def test_a_reasoning_gym_request_that_cannot_be_met_says_why(
    tmp_path: Path, task: str, size: int, config: dict[str, Any], part: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make_reasoning_gym(task, size, 0, tmp_path / "out.parquet", config)
    assert part in str(caught.value)
