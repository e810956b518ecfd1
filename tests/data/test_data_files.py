"""Every wrong file is refused before a row is read, by a message that says where and what to do."""

import gzip
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_worker.data.columns import keys_of_table
from grpo_worker.data.files import Rows, open_files
from grpo_worker.data.options import DataOptions
from grpo_worker.errors import DataError, ExitCode, UsageError

GOOD = {"prompt": ["a"], "response": [""], "reward": ["1"]}


def message(files: Sequence[Path | str], options: DataOptions | None = None) -> str:
    with pytest.raises(DataError) as caught:
        open_files(files, options or DataOptions())
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
    (rows,) = open_files([path], DataOptions())
    assert rows.keys.others_of(rows.take([0])[0]) == {}
    assert "has no column 'solution'" in message([path], DataOptions(response_key="solution"))


@pytest.mark.parametrize("response", [["b"], [None], [7], [["tokens"]]])
def test_a_response_is_read_by_nobody_whatever_its_type(write_parquet: Any, response: list[Any]) -> None:
    (rows,) = open_files(
        [write_parquet({"prompt": ["a"], "response": response, "reward": ["1"], "n": [1]})], DataOptions()
    )
    assert rows.keys.others_of(rows.take([0])[0]) == {"n": 1}


def test_the_field_of_the_message_is_the_one_that_named_the_file(tmp_path: Path) -> None:
    text = message([tmp_path / "val.parquet"], DataOptions(field="data.validationFiles"))
    assert text.startswith("data.validationFiles[0]: ")


def test_no_files_is_an_error() -> None:
    assert message([]) == "data.trainFiles: no files are given. Name at least one."


def test_a_missing_file_suggests_a_near_one(write_parquet: Any, tmp_path: Path) -> None:
    path = write_parquet(GOOD)
    missing = tmp_path / "trian.parquet"
    assert message([missing]) == f"data.trainFiles[0]: {missing} does not exist. Did you mean {path}?"
    assert "Nor does its directory" in message([tmp_path / "no" / "train.parquet"])


def test_a_directory_is_not_a_file(write_parquet: Any, tmp_path: Path) -> None:
    path = write_parquet(GOOD)
    assert f"is a directory. Name its files such as {path}, or {tmp_path}/*.parquet." in message([tmp_path])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "train.parquet is empty (0 bytes)"),
        (
            b'{"question": "a"}\n',
            "is not a Parquet file: it looks like JSON. Write an object a line and call it NAME.jsonl.",
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer, not the data. Run `git lfs pull`"),
        (gzip.compress(b"x", mtime=0), "it is gzip. Unpack it first."),
        (b"prompt,reward\n", "is not a Parquet file (it starts with b'prom', not b'PAR1'), nor called .jsonl or .csv."),
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
        ({"prompt": ["a"], "reward": [None]}, "has type null, not text, a number, a truth value, or lists or structs"),
        ({"prompt": ["a"], "reward": [b"1"]}, "has type binary, not text, a number"),
        (
            {"prompt": ["a"], "reward": [{"when": datetime(2026, 1, 1)}]},
            "has type struct<when: timestamp[us]>, not text",
        ),
    ],
)
def test_a_column_of_the_wrong_type_is_named_with_its_type(
    write_parquet: Any, columns: dict[str, Any], part: str
) -> None:
    assert part in message([write_parquet(columns)])


def test_files_need_not_be_written_alike(write_parquet: Any) -> None:
    chat = [[{"role": "user", "content": "a"}]]
    columns: list[dict[str, Any]] = [GOOD, {**GOOD, "reward": [1]}, {**GOOD, "prompt": chat}]
    found = open_files([write_parquet(each, f"{n}.parquet") for n, each in enumerate(columns)], DataOptions())
    values = [(rows.keys.prompt_of(row), rows.keys.reward_of(row)) for rows in found for row in rows.take([0])]
    assert values == [("a", "1"), ("a", 1), (chat[0], "1")]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["1"]), pa.array(["b"])], ["prompt", "reward", "prompt"])
    pq.write_table(table, path)
    assert "train.parquet has two columns named 'prompt'" in message([path])


TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_the_ways_to_write_text_and_messages_are_accepted(write_parquet: Any, text: pa.DataType) -> None:
    message_type = pa.struct([("role", text), ("content", text)])
    lists = [pa.list_, pa.large_list, lambda each: pa.list_(each, 1)]
    for number, prompt_type in enumerate([text, *(make(message_type) for make in lists)]):
        schema = pa.schema([("prompt", prompt_type), ("reward", text)])
        assert keys_of_table(schema, DataOptions(), "data.trainFiles[0]", "x.parquet").prompt == ("prompt",)
        if number == 0:
            (rows,) = open_files([write_parquet({"prompt": pa.array(["a"], text), "reward": [1.0]})], DataOptions())
            assert rows.keys.prompt_of(rows.take([0])[0]) == "a"


def test_a_dotted_key_reads_a_struct_and_a_literal_name_comes_first(write_parquet: Any) -> None:
    options = DataOptions(reward_key="judge.truth")
    nested = write_parquet({"prompt": ["a", "b"], "judge": [{"truth": "1"}, None]}, "nested.parquet")
    literal = write_parquet({"prompt": ["a"], "judge.truth": ["2"], "judge": [{"truth": "3"}]}, "literal.parquet")
    found = open_files([nested, literal], options)
    assert [rows.keys.reward_of(row) for rows in found for row in rows.take(range(len(rows)))] == ["1", None, "2"]


# The columns that verl's examples/data_preprocess write, by data set.
VERL = {
    "gsm8k": {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "1+1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"split": "train", "index": 0, "answer": "#### 2", "question": "1+1?"},
    },
    "dapo": {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": "1+1?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    },
    "search-r1": {
        "data_source": "searchR1_nq",
        "prompt": [{"role": "system", "content": "Search."}, {"role": "user", "content": "Who?"}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": ["Ann", "Bo"]}, "style": "rule"},
        "extra_info": {"index": 3, "need_tools_kwargs": True, "tools_kwargs": {"search": {"create_kwargs": {"question": "Who?"}}}},
        "metadata": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", VERL)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_verls_files_are_read_as_they_are(tmp_path: Path, layout: str, kind: str) -> None:
    row = VERL[layout]
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    else:
        path.write_text(f"{json.dumps(row)}\n" * 2)
    (rows,) = open_files([path], DataOptions())
    found = rows.take([1])[0]
    assert rows.keys.prompt_of(found) == row["prompt"]
    assert rows.keys.reward_of(found) == row["reward_model"]["ground_truth"]
    assert rows.keys.others_of(found) == {name: value for name, value in row.items() if name != "prompt"}


def test_verls_struct_is_not_taken_where_a_key_was_asked_for(write_parquet: Any) -> None:
    path = write_parquet({"prompt": ["a"], "reward_model": [{"ground_truth": "1"}]})
    assert "has no column 'answer'" in message([path], DataOptions(reward_key="answer"))
    both = write_parquet({**GOOD, "reward_model": [{"ground_truth": "2"}]}, "both.parquet")
    (rows,) = open_files([both], DataOptions())
    assert rows.keys.reward_of(rows.take([0])[0]) == "1"


def texts(found: list[Rows]) -> list[tuple[Any, Any]]:
    return [
        (rows.keys.prompt_of(row), rows.keys.reward_of(row)) for rows in found for row in rows.take(range(len(rows)))
    ]


def test_json_lines_are_taken_at_their_word(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(
        '\ufeff{"prompt": "2026-01-01", "reward": "007"}\n{"prompt": "a\u2028b", "reward": 12345678901234567890123}\n'
        '{"reward": "x", "prompt": [{"role": "user", "content": "c"}], "more": {"a": [1, "b"]}}',
    )
    found = open_files([path], DataOptions())
    chat = [{"role": "user", "content": "c"}]
    assert texts(found) == [("2026-01-01", "007"), ("a\u2028b", 12345678901234567890123), (chat, "x")]
    assert found[0].keys.others_of(found[0].take([2])[0]) == {"more": {"a": [1, "b"]}}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"prompt": "a", "reward": 1', "train.jsonl row 0 is not JSON"),
        ("[1]\n", "is one JSON array. Write an object a line"),
        ("7\n", "train.jsonl row 0 is not a JSON object"),
        ('{"question": "a", "answer": 1}\n', "has no 'prompt' (keys: question, answer). It looks like raw GSM8K"),
        ('{"prompt": "a", "answer": 1}\n', "has no 'reward' (keys: prompt, answer). Is it 'answer'? Rename it"),
    ],
)
def test_json_lines_that_cannot_be_used_say_where(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    assert part in message([path])


def test_cells_of_csv_are_text_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,reward\n"a, ""b""\nc",007\nNA,1e3\n')
    (tmp_path / "b.tsv").write_text("reward\tprompt\ttopic\n1.50\td, e\tsums\n")
    found = open_files([tmp_path / "a.csv", tmp_path / "b.tsv"], DataOptions())
    assert texts(found) == [('a, "b"\nc', "007"), ("NA", "1e3"), ("d, e", "1.50")]
    assert found[1].keys.others_of(found[1].take([0])[0]) == {"topic": "sums"}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("prompt,reward\n", "train.csv is empty (0 rows)"),
        ("prompt,reward\na,1,2\n", "has 2 names in its first line and 3 cells in its second"),
        ("prompt,reward,prompt\na,1,b\n", "has two columns named 'prompt'"),
        ("prompt,reward\na,1\nb,1,2\n", "cannot be read (ParserError"),
        ("prompt,answer\na,1\n", "train.csv has no column 'reward' (columns: prompt, answer). Is it 'answer'?"),
    ],
)
def test_csv_that_cannot_be_used_says_why(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(content)
    assert part in message([path])


def test_a_pattern_stands_for_its_files_in_their_order(write_parquet: Any, tmp_path: Path) -> None:
    for tag in ("b", "a", "c"):
        write_parquet(1, f"part-{tag}.parquet", tag=tag)
    found = open_files([str(tmp_path / "part-[ab].parquet"), tmp_path / "part-c.parquet"], DataOptions())
    assert [(rows.name, rows.label) for rows in found] == [
        ("part-a.parquet", "data.trainFiles[0]"),
        ("part-b.parquet", "data.trainFiles[0]"),
        ("part-c.parquet", "data.trainFiles[1]"),
    ]
    pattern = f"{tmp_path}/*.jsonl"
    assert message([Path(pattern)]).startswith(f"data.trainFiles[0]: no file is called {pattern}.")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(write_parquet: Any) -> None:
    path = write_parquet(3, "train[1].parquet")
    (rows,) = open_files([path], DataOptions())
    assert len(rows) == 3


def test_a_data_set_has_configurations_and_splits(write_parquet: Any, tmp_path: Path) -> None:
    """By what the library does for a directory as for a repository; the hub itself is not asked."""
    repository = tmp_path / "sums"
    repository.mkdir()
    for split, rows in (("train", 3), ("test", 2)):
        write_parquet(rows, f"sums/{split}.parquet", tag=split)
    train, test = open_files([f"hf://{repository}", f"hf://{repository}::test"], DataOptions())
    assert [prompt for prompt, _ in texts([train, test])] == ["train0", "train1", "train2", "test0", "test1"]
    assert "cannot be loaded from the Hugging Face hub (ValueError: Unknown split" in message(
        [f"hf://{repository}::validation"]
    )


def test_a_data_set_of_the_hub_that_cannot_be_had_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        open_files(["hf://openai/gsm8k:main"], DataOptions())
    assert str(caught.value).startswith(
        "data.trainFiles[0]: hf://openai/gsm8k:main cannot be loaded from the Hugging Face hub ("
    )


@pytest.mark.parametrize(
    ("values", "part"), [({"seed": -1}, "data.seed"), ({"total_epochs": 0}, "trainer.totalEpochs")]
)
def test_options_out_of_range_are_refused(values: dict[str, int], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        DataOptions(**values)  # type: ignore[arg-type]
