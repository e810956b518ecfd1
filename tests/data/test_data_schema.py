"""Every wrong file is refused before a row is read, by a message that says where and what to do."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_worker.data.options import DataOptions
from grpo_worker.data.schema import Kind, check_files
from grpo_worker.errors import DataError, ExitCode, UsageError

GOOD = {"prompt": ["a"], "response": [""], "reward": ["1"]}


def message(files: list[Path], options: DataOptions | None = None) -> str:
    with pytest.raises(DataError) as caught:
        check_files(files, options or DataOptions())
    assert caught.value.exit_code is ExitCode.DATA
    return str(caught.value)


def test_a_missing_column_lists_the_columns_and_the_remedy(write_parquet: Any) -> None:
    path = write_parquet({"prompt": ["a"], "response": [""]})
    assert message([path]) == (
        "data.trainFiles[0]: train.parquet has no column 'reward' (columns: prompt, response). "
        "Rename it, or set data.rewardKey."
    )


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (
            {"Prompt": ["a"], "reward": ["1"]},
            "'Prompt' differs only in case: rename it, or set data.promptKey: Prompt.",
        ),
        ({"prompt": ["a"], "rewards": ["1"]}, "Is it 'rewards'? Rename it, or set data.rewardKey: rewards."),
        ({"prompt": ["a"], "answer": ["1"]}, "Is it 'answer'? Rename it, or set data.rewardKey: answer."),
        ({"problem": ["a"], "reward": ["1"]}, "Is it 'problem'? Rename it, or set data.promptKey: problem."),
        (
            {"prompt": ["a"], "reward_model": [{"style": "rule", "ground_truth": "1"}]},
            "verl keeps it in a struct: set data.rewardKey: reward_model.ground_truth.",
        ),
        ({"question": ["a"], "answer": ["#### 1"]}, "It looks like raw GSM8K: convert it with `grpo data gsm8k`"),
        (
            {"prompt": ["a"], "Response": [""], "reward": ["1"]},
            "has no column 'response' (columns: prompt, Response, reward). 'Response' differs only in case: "
            "rename it, or set data.responseKey: Response.",
        ),
    ],
)
def test_a_renamed_column_gets_a_hint(write_parquet: Any, columns: dict[str, Any], hint: str) -> None:
    assert hint in message([write_parquet(columns)])


def test_everything_wrong_is_reported_at_once(write_parquet: Any, tmp_path: Path) -> None:
    first = write_parquet({"Prompt": ["a"]}, "first.parquet")
    lines = message([first, tmp_path / "none.parquet"]).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["data.trainFiles[0]:"] * 2 + ["data.trainFiles[1]:"]


def test_a_response_column_may_be_absent_unless_it_is_named(write_parquet: Any) -> None:
    path = write_parquet({"prompt": ["a"], "reward": ["1"]})
    assert check_files([path], DataOptions())[0].columns.response is None
    assert "has no column 'solution'" in message([path], DataOptions(response_key="solution"))


def test_the_field_of_the_message_is_the_one_that_named_the_file(tmp_path: Path) -> None:
    text = message([tmp_path / "val.parquet"], DataOptions(field="data.validationFiles"))
    assert text.startswith("data.validationFiles[0]: ")


def test_no_files_is_an_error() -> None:
    assert message([]) == "data.trainFiles: no files are given. Name at least one Parquet file."


def test_a_missing_file_suggests_a_near_one(write_parquet: Any, tmp_path: Path) -> None:
    path = write_parquet(GOOD)
    missing = tmp_path / "trian.parquet"
    assert message([missing]) == f"data.trainFiles[0]: {missing} does not exist. Did you mean {path}?"
    assert "Nor does its directory" in message([tmp_path / "no" / "train.parquet"])


def test_a_directory_is_not_a_file(write_parquet: Any, tmp_path: Path) -> None:
    path = write_parquet(GOOD)
    assert f"is a directory. Name its Parquet files such as {path}." in message([tmp_path])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "train.parquet is empty (0 bytes)"),
        (b'{"question": "a"}\n', "is not a Parquet file: it looks like JSON. Convert it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer, not the data. Run `git lfs pull`"),
        (gzip.compress(b"x", mtime=0), "it is gzip. Unpack it first."),
        (b"prompt,reward\n", "is not a Parquet file (it starts with b'prom', not b'PAR1')"),
        (b"PAR1" + b"\0" * 40, "is cut off: it has no Parquet footer. Copy or write it again."),
        (b"PAR1" + b"\0" * 40 + b"PAR1", "cannot be read as Parquet"),
        (b"PAR1", "is cut off"),
    ],
)
def test_what_is_not_parquet_is_named_for_what_it_is(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(content)
    assert part in message([path])


def test_a_file_without_rows_is_refused(write_parquet: Any) -> None:
    path = write_parquet({"prompt": pa.array([], pa.string()), "reward": pa.array([], pa.string())})
    assert "train.parquet is empty (0 rows)" in message([path])


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"prompt": [1], "reward": ["1"]}, "column 'prompt' of train.parquet has type int64, not text or a list of"),
        ({"prompt": [b"a"], "reward": ["1"]}, "has type binary, not text"),
        ({"prompt": [["a"]], "reward": ["1"]}, "column 'prompt' of train.parquet has type list"),
        ({"prompt": [[{"role": "user"}]], "reward": ["1"]}, "column 'prompt' of train.parquet has type list"),
        ({"prompt": ["a"], "reward": [["1"]]}, "not text or a number"),
        ({"prompt": ["a"], "reward": [True]}, "has type bool, not text or a number"),
        ({"prompt": ["a"], "reward": [None]}, "has type null, not text or a number"),
        ({"prompt": ["a"], "reward": ["1"], "response": [1]}, "has type int64, not text"),
    ],
)
def test_a_column_of_the_wrong_type_is_named_with_its_type(
    write_parquet: Any, columns: dict[str, Any], part: str
) -> None:
    assert part in message([write_parquet(columns)])


def test_mixed_types_between_files_name_both_files(write_parquet: Any) -> None:
    text = write_parquet(GOOD, "a.parquet")
    number = write_parquet({**GOOD, "reward": [1]}, "b.parquet")
    chat = write_parquet({**GOOD, "prompt": [[{"role": "user", "content": "a"}]]}, "c.parquet")
    lines = message([text, number, chat]).splitlines()
    assert lines == [
        "data.trainFiles[2]: column 'prompt' of c.parquet is messages, but text in a.parquet (data.trainFiles[0]). "
        "Write both alike.",
        "data.trainFiles[1]: column 'reward' of b.parquet is number, but text in a.parquet (data.trainFiles[0]). "
        "Write both alike.",
    ]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["1"]), pa.array(["b"])], ["prompt", "reward", "prompt"])
    pq.write_table(table, path)
    assert "train.parquet has two columns named 'prompt'" in message([path])


@pytest.mark.parametrize(
    "prompt",
    [
        pa.array(["a"], pa.large_string()),
        pa.array(["a"]).dictionary_encode(),
        pa.array([[{"role": "user", "content": "a"}]]),
    ],
)
def test_the_ways_to_write_text_and_messages_are_accepted(write_parquet: Any, prompt: pa.Array) -> None:
    schema = check_files([write_parquet({"prompt": prompt, "reward": [1.0]})], DataOptions())[0]
    assert schema.columns.prompt.kind in (Kind.TEXT, Kind.MESSAGES)
    assert schema.columns.reward.kind is Kind.NUMBER


def test_a_dotted_key_reads_verls_struct_and_a_literal_name_comes_first(write_parquet: Any) -> None:
    options = DataOptions(reward_key="reward_model.ground_truth")
    nested = write_parquet({"prompt": ["a"], "reward_model": [{"ground_truth": "1"}]}, "nested.parquet")
    column = check_files([nested], options)[0].columns.reward
    assert column.value({"reward_model": {"ground_truth": "1"}}) == "1"
    assert column.value({"reward_model": None}) is None
    literal = write_parquet({"prompt": ["a"], "reward_model.ground_truth": ["2"]}, "literal.parquet")
    assert check_files([literal], options)[0].columns.reward.path == ()


@pytest.mark.parametrize(
    ("values", "part"), [({"seed": -1}, "data.seed"), ({"total_epochs": 0}, "trainer.totalEpochs")]
)
def test_options_out_of_range_are_refused(values: dict[str, int], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        DataOptions(**values)  # type: ignore[arg-type]
