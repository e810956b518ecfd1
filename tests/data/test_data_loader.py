"""Order, cursor, memory and restore of the prompts."""

import itertools
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_worker.data import Cursor, DataOptions, FunctionRows, PromptDataset, PromptEncoder, open_files
from grpo_worker.data.order import epoch_order, permutation
from grpo_worker.errors import DataError

# Of the module, since Arrow keeps only a pointer: a pool that dies before a buffer of it takes the process along.
DEFAULT_POOL = pa.default_memory_pool()
COUNTING_POOL = pa.proxy_memory_pool(DEFAULT_POOL)


@pytest.fixture
def encoder(plain_tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(plain_tokenizer, 8)


def dataset(files: list[Path], encoder: PromptEncoder, **options: Any) -> PromptDataset:
    chosen = DataOptions(**options)
    return PromptDataset(open_files(files, chosen), chosen, encoder)


def of_function(
    spec: str, encoder: PromptEncoder, kwargs: dict[str, Any] | None = None, **options: Any
) -> PromptDataset:
    chosen = DataOptions(**options)
    return PromptDataset([FunctionRows(spec, chosen, kwargs)], chosen, encoder)


@pytest.fixture
def two_files(write_parquet: Any) -> list[Path]:
    """17 rows in 6 row groups, three of them too long: rows 2 and 3 of a.parquet, row 0 of b.parquet."""
    a = [f"a{n}" if n not in (2, 3) else "x" * 9 for n in range(11)]
    b = ["y" * 9 if n == 0 else f"b{n}" for n in range(6)]
    return [
        write_parquet({"prompt": a, "reward": [str(n) for n in range(11)], "level": list(range(11))}, "a.parquet", 3),
        write_parquet({"prompt": b, "reward": [str(n) for n in range(6)], "level": [None] * 6}, "b.parquet", 4),
    ]


def test_scan_counts_exactly(two_files: list[Path], encoder: PromptEncoder) -> None:
    report = dataset(two_files, encoder).scan()
    assert (report.rows, report.kept, report.dropped_overlong, report.truncated) == (17, 14, 3, 0)
    assert report.longest_prompt_tokens == 3


def test_without_shuffle_rows_come_in_file_order_with_all_their_columns(
    two_files: list[Path], encoder: PromptEncoder
) -> None:
    prompts = list(dataset(two_files, encoder, shuffle=False).iterate())
    assert [(p.file, p.row) for p in prompts] == [
        *((0, row) for row in range(11) if row not in (2, 3)),
        *((1, row) for row in range(1, 6)),
    ]
    third = prompts[2]
    assert (third.uid, third.epoch, third.position, third.text) == ("e0-f0-r4", 0, 2, "a4")
    assert (third.ground_truth, third.data) == ("4", {"level": 4})
    assert encoder.tokenizer.decode(third.token_ids) == "a4"


def test_an_epoch_has_each_kept_row_once_and_epochs_and_seeds_differ(
    two_files: list[Path], encoder: PromptEncoder
) -> None:
    orders = {}
    for seed in (0, 1):
        prompts = list(dataset(two_files, encoder, seed=seed, total_epochs=2).iterate())
        assert len({prompt.uid for prompt in prompts}) == 28
        for epoch in (0, 1):
            orders[seed, epoch] = [(p.file, p.row) for p in prompts if p.epoch == epoch]
    assert all(Counter(order) == Counter(orders[0, 0]) for order in orders.values())
    assert all(one != other for one, other in itertools.combinations(orders.values(), 2))


def test_the_rows_of_all_files_are_one_sequence_that_each_epoch_shuffles_anew(
    write_parquet: Any, encoder: PromptEncoder
) -> None:
    files = [write_parquet(100, f"{tag}.parquet", row_group_rows=100, tag=tag) for tag in "ab"]
    prompts = list(dataset(files, encoder, total_epochs=3).iterate())
    epochs = [[(p.file, p.row) for p in prompts[start : start + 200]] for start in (0, 200, 400)]
    assert [sorted(order) for order in epochs] == [[(file, row) for file in (0, 1) for row in range(100)]] * 3
    assert len({tuple(order) for order in epochs}) == 3
    for order in epochs:  # both files are in every tenth of an epoch: the odds of one missing are 2 in a million
        assert all({file for file, _ in order[start : start + 20]} == {0, 1} for start in range(0, 200, 20))


def test_rows_that_are_left_out_move_no_other() -> None:
    everyone = epoch_order(np.ones(50, np.bool_), seed=1, epoch=2, shuffle=True)
    kept = np.arange(50) % 7 != 3
    assert sorted(everyone.tolist()) == list(range(50))
    assert epoch_order(kept, seed=1, epoch=2, shuffle=True).tolist() == [n for n in everyone.tolist() if n % 7 != 3]


def test_the_same_seed_gives_the_same_order(two_files: list[Path], encoder: PromptEncoder) -> None:
    one, other = (list(dataset(two_files, encoder, seed=3, total_epochs=2).iterate()) for _ in range(2))
    assert one == other


def test_the_order_is_the_same_on_every_python_and_numpy() -> None:
    """The recorded values are Philox's raw stream, which NumPy keeps for ever."""
    assert permutation(8, (42, 0, 2, 0)).tolist() == GOLDEN_PERMUTATION
    assert permutation(8, (42, 0, 2, 1)).tolist() != GOLDEN_PERMUTATION
    assert permutation(0, (1,)).tolist() == [] and permutation(1, (1,)).tolist() == [0]


GOLDEN_PERMUTATION = [3, 7, 2, 5, 1, 4, 0, 6]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_cursor_goes_on_as_an_uninterrupted_run_does(
    two_files: list[Path], encoder: PromptEncoder, shuffle: bool
) -> None:
    data = dataset(two_files, encoder, seed=5, shuffle=shuffle, total_epochs=3)
    whole = list(data.iterate())
    assert len(whole) == 3 * 14
    for done in range(len(whole) + 1):
        cursor = whole[done - 1].next_cursor if done else Cursor()
        fresh = dataset(two_files, encoder, seed=5, shuffle=shuffle, total_epochs=3)
        state = json.loads(json.dumps(data.state_dict(cursor)))
        assert list(fresh.iterate(fresh.restore(state))) == whole[done:]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40).filter(lambda values: min(values) <= 8),
    group_rows=st.integers(1, 9),
    seed=st.integers(0, 2**64),
    cut=st.floats(0, 1),
)
def test_any_file_resumes_at_any_place(
    write_parquet: Any, encoder: PromptEncoder, lengths: list[int], group_rows: int, seed: int, cut: float
) -> None:
    path = write_parquet({"prompt": ["z" * n for n in lengths], "reward": lengths}, "any.parquet", group_rows)
    data = dataset([path], encoder, seed=seed, total_epochs=2)
    whole = list(data.iterate())
    kept = sum(length <= 8 for length in lengths)
    assert len(whole) == 2 * kept == 2 * data.scan().kept
    done = int(cut * len(whole))
    assert list(data.iterate(Cursor(done // kept, done % kept))) == whole[done:]


def test_the_end_of_an_epoch_is_the_start_of_the_next(two_files: list[Path], encoder: PromptEncoder) -> None:
    data = dataset(two_files, encoder, total_epochs=2)
    assert list(data.iterate(Cursor(0, 14))) == list(data.iterate(Cursor(1, 0)))
    assert list(data.iterate(Cursor(2, 0))) == []


@pytest.mark.parametrize("cursor", [Cursor(0, 15), Cursor(0, -1), Cursor(-1, 0)])
def test_a_cursor_outside_the_data_is_refused(two_files: list[Path], encoder: PromptEncoder, cursor: Cursor) -> None:
    with pytest.raises(DataError, match="is outside an epoch of 14 prompts"):
        dataset(two_files, encoder).iterate(cursor)


def test_a_second_start_finds_the_tokens_in_the_cache(
    two_files: list[Path], encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(dataset(two_files, encoder).iterate())
    encoded: list[int] = []
    encode = PromptEncoder.encode_batch
    monkeypatch.setattr(
        PromptEncoder, "encode_batch", lambda self, some, where: encoded.append(len(some)) or encode(self, some, where)
    )
    assert list(dataset(two_files, encoder).iterate()) == whole
    assert encoded == []
    assert dataset(two_files, replace(encoder, max_prompt_tokens=9)).scan().kept == 17
    assert encoded == [11, 6]


@pytest.mark.parametrize(
    "change",
    [
        {"max_prompt_tokens": 9}, {"filter_overlong": False, "truncation": "left"}, {"chat_template": "never"},
        {"system_prompt": "Be brief."}, {"template_kwargs": {"suffix": "!"}},
    ],
)  # fmt: skip
def test_the_cache_knows_each_setting_that_changes_a_prompt(chat_tokenizer: Any, change: dict[str, Any]) -> None:
    before = PromptEncoder(chat_tokenizer, 8)
    assert before.identity() == PromptEncoder(chat_tokenizer, 8).identity()
    assert before.identity() != replace(before, **change).identity()


def test_the_cache_knows_the_template_and_the_tokens(make_tokenizer: Any) -> None:
    plain, chat, added = (make_tokenizer(eos_token="<eos>") for _ in range(3))
    chat.chat_template = "{{ messages[0].content }}"
    added.add_tokens(["<think>"])
    assert len({PromptEncoder(tokenizer, 8).identity() for tokenizer in (plain, chat, added)}) == 3


def test_a_file_that_was_written_again_is_read_again(write_parquet: Any, encoder: PromptEncoder) -> None:
    path = write_parquet(10)
    data, status = dataset([path], encoder), path.stat()
    assert data.scan().rows == 10
    write_parquet(12)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as an archive that is unpacked does
    assert len(list(data.iterate())) == 10, "what a job has opened it reads to its end"
    assert dataset([path], encoder).scan().rows == 12


def test_text_of_any_size_is_read_in_small_pieces(tmp_path: Path, plain_tokenizer: Any) -> None:
    """32 MiB in one row group: neither the scan nor the reading of single rows takes a tenth of that from Arrow."""
    rows = 2048
    path = tmp_path / "large.parquet"
    blobs = [os.urandom(8192).hex() for _ in range(rows)]
    table = pa.table({"prompt": [str(n) for n in range(rows)], "reward": ["1"] * rows, "blob": blobs})
    pq.write_table(table, path, row_group_size=rows, use_dictionary=False, compression="none")
    del table, blobs
    dataset([path], PromptEncoder(plain_tokenizer, 8)).scan()  # the copy that is mapped is made once, chunk by chunk
    pa.set_memory_pool(COUNTING_POOL)
    try:
        data = dataset([path], PromptEncoder(plain_tokenizer, 7), seed=1)
        assert data.scan().kept == rows
        prompts = data.iterate()
        texts = {next(prompts).text for _ in range(300)}
        prompts.close()
        assert len(texts) == 300 and COUNTING_POOL.max_memory() < 8 << 20
    finally:
        pa.set_memory_pool(DEFAULT_POOL)


def test_empty_row_groups_are_passed_over(tmp_path: Path, encoder: PromptEncoder) -> None:
    path, schema = tmp_path / "gaps.parquet", pa.schema([("prompt", pa.string()), ("reward", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for prompts in (["a"], [], ["b", "c"]):
            writer.write_table(pa.table({"prompt": prompts, "reward": ["1"] * len(prompts)}, schema=schema))
    prompts = dataset([path], encoder, shuffle=False).iterate()
    assert [(prompt.row, prompt.text) for prompt in prompts] == [(0, "a"), (1, "b"), (2, "c")]


@pytest.mark.parametrize(
    ("rewards", "texts"),
    [
        (["42", " x "], ["42", " x "]),
        ([42, -7], ["42", "-7"]),
        ([42.0, 0.5], ["42", "0.5"]),
        (pa.array([0.1, 2.0], pa.float32()), ["0.1", "2"]),
        (pa.array([0.1, 2.0], pa.float16()), ["0.1", "2"]),
        (pa.array(["1.50", "100"]).cast(pa.decimal128(5, 2)), ["1.50", "100"]),
        ([True, False], ["true", "false"]),
        ([["a", "b"], []], ['["a", "b"]', "[]"]),
        (pa.array([[0.1], [2.5]], pa.list_(pa.float32())), ["[0.1]", "[2.5]"]),
        ([{"target": ["Ωmega"]}, {"target": ["b"]}], ['{"target": ["Ωmega"]}', '{"target": ["b"]}']),
        (pa.array(["x", "y"], pa.string_view()), ["x", "y"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
    ],
)
def test_the_ground_truth_is_text(write_parquet: Any, encoder: PromptEncoder, rewards: Any, texts: list[str]) -> None:
    path = write_parquet({"prompt": ["a", "b"], "reward": rewards})
    assert [prompt.ground_truth for prompt in dataset([path], encoder, shuffle=False).iterate()] == texts


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"prompt": ["a", "b", None], "reward": ["1"] * 3}, "train.parquet row 2: the prompt is null"),
        ({"prompt": ["a", "b", ""], "reward": ["1"] * 3}, "train.parquet row 2: the prompt is empty"),
        ({"prompt": ["a"] * 3, "reward": ["1", "1", None]}, "train.parquet row 2: the ground truth is null"),
        ({"prompt": ["a"] * 3, "reward": [1.0, 1.0, float("nan")]}, "train.parquet row 2: the ground truth is nan"),
    ],
)
def test_a_bad_row_is_found_by_the_scan_and_named(
    write_parquet: Any, encoder: PromptEncoder, columns: dict[str, Any], part: str
) -> None:
    with pytest.raises(DataError) as caught:
        dataset([write_parquet(columns, row_group_rows=2)], encoder).scan()
    assert f"data.trainFiles[0]: {part}" in str(caught.value)


def test_a_prompt_over_the_limit_names_its_row(write_parquet: Any, plain_tokenizer: Any) -> None:
    path = write_parquet({"prompt": ["a", "b", "c", "d" * 9], "reward": ["1"] * 4}, row_group_rows=3)
    strict = PromptEncoder(plain_tokenizer, 8, filter_overlong=False)
    with pytest.raises(DataError, match=r"train.parquet row 3: the prompt has 9 tokens, over data.maxPromptLength = 8"):
        dataset([path], strict).scan()
    cut = PromptEncoder(plain_tokenizer, 8, truncation="left", filter_overlong=False)
    assert dataset([path], cut).scan().truncated == 1


def test_no_prompt_within_the_limit_is_an_error(write_parquet: Any, plain_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"all 10 prompts are over data\.maxPromptLength = 1 tokens"):
        dataset([write_parquet(10)], PromptEncoder(plain_tokenizer, 1)).scan()


def test_steps_per_epoch_drops_the_last_part_and_refuses_a_batch_over_the_data(
    two_files: list[Path], encoder: PromptEncoder
) -> None:
    data = dataset(two_files, encoder)
    assert [data.steps_per_epoch(batch) for batch in (1, 4, 14)] == [14, 3, 1]
    with pytest.raises(DataError) as caught:
        data.steps_per_epoch(15)
    assert str(caught.value) == (
        "data.trainBatchSize: 15 prompts a step, but data.trainFiles has 14 (3 of 17 are over data.maxPromptLength = 8 "
        "tokens). Lower data.trainBatchSize to 14 or less, or add data."
    )


def test_messages_and_verls_columns_are_read_as_they_are(write_parquet: Any, chat_tokenizer: Any) -> None:
    path = write_parquet(
        {
            "data_source": ["openai/gsm8k"],
            "prompt": [[{"role": "user", "content": "1+1?"}]],
            "reward_model": [{"ground_truth": "2", "style": "rule"}],
        }
    )
    (prompt,) = dataset([path], PromptEncoder(chat_tokenizer, 50)).iterate()
    assert (prompt.text, prompt.ground_truth) == ("<u>1+1?|<a>", "2")
    assert prompt.data == {"data_source": "openai/gsm8k", "reward_model": {"ground_truth": "2", "style": "rule"}}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rows": 11}, "train.parquet had 10 rows and has 11"),
        ({"tag": "longer"}, "train.parquet had"),
        ({"tag": "q"}, "train.parquet has other prompts or ground truths than before"),
        ({"name": "other.parquet"}, "the files were train.parquet and are other.parquet"),
        ({"options": {"seed": 9}}, "data.seed was 0 and is 9"),
        ({"options": {"shuffle": False}}, "data.shuffle was True and is False"),
        ({"limit": 1}, "10 prompts were within the length limit and 0 are"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_restoring_with_changed_data_says_what_changed(
    write_parquet: Any, plain_tokenizer: Any, change: dict[str, Any], part: str
) -> None:
    # Nine one-digit prompts of 2 tokens; the tenth is over a limit of 2.
    columns = {"prompt": [f"p{n}" for n in range(9)] + ["long"], "reward": ["1"] * 10}
    first = dataset([write_parquet(columns)], PromptEncoder(plain_tokenizer, 8))
    state = first.state_dict(Cursor(0, 3))
    limit = change.get("limit")
    if limit:
        part, limit = "within the length limit, 10 then and 9 now (data.maxPromptLength was 8 and is 2)", 2
    tag, rows = change.get("tag", "p"), change.get("rows", 10)
    columns = {"prompt": [f"{tag}{n}" for n in range(9)] + ["long"] * (rows - 9), "reward": ["1"] * rows}
    path = write_parquet(columns, change.get("name", "train.parquet"))
    second = dataset([path], PromptEncoder(plain_tokenizer, limit or 8), **change.get("options", {}))
    with pytest.raises(DataError) as caught:
        second.restore(state)
    assert "the data is not what the checkpoint was made with" in str(caught.value) and part in str(caught.value)


def test_more_epochs_may_be_asked_for_at_restore(write_parquet: Any, encoder: PromptEncoder) -> None:
    path = write_parquet(10)
    state = dataset([path], encoder).state_dict(Cursor(1, 0))
    longer = dataset([path], encoder, total_epochs=2)
    assert len(list(longer.iterate(longer.restore(state)))) == 10


@pytest.mark.parametrize("state", [{}, {"version": 2, "cursor": {}, "fingerprint": {}}, {"version": 2, "cursor": None}])
def test_a_state_that_cannot_be_read_is_a_data_error(
    write_parquet: Any, encoder: PromptEncoder, state: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="data state cannot be read"):
        dataset([write_parquet(10)], encoder).restore(state)


def test_a_state_of_another_version_is_refused(write_parquet: Any, encoder: PromptEncoder) -> None:
    data = dataset([write_parquet(10)], encoder)
    with pytest.raises(DataError, match="keeps its data state in version 3, this program in 2"):
        data.restore({**data.state_dict(Cursor()), "version": 3})


USER_MODULE = """
def rows(n=5):
    return ({"prompt": f"f{i}", "reward": i, "hint": i * i} for i in range(n))
def other():
    return [{"prompt": "z", "reward": 1}] * 5
def raises():
    raise RuntimeError("no license")
def number():
    return 7
def empty():
    return []
def texts():
    return ["a"]
def no_reward():
    return [{"prompt": "a", "reward": 1}, {"prompt": "a", "answer": 1}]
def other_shape():
    return [{"prompt": "a", "reward_model": {"ground_truth": 1}}, {"prompt": "a", "reward": 1}]
def of_numpy():
    import numpy as np
    messages = np.array([{"role": "user", "content": "a"}], dtype=object)
    truths = (np.float32(0.1), np.int64(7), np.bool_(True), np.array([1, 2]), {"target": np.array(["x"])})
    return [{"prompt": messages, "reward": truth} for truth in truths]
value = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_data.py").write_text(USER_MODULE)
    (tmp_path / "broken_data.py").write_text("import no_such_dependency")
    (tmp_path / "raising_data.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_data", raising=False)
    return "user_data"


def test_a_function_is_a_dataset_with_the_same_interface(user_module: str, encoder: PromptEncoder) -> None:
    data = of_function("user_data:rows", encoder, {"n": 7}, seed=2, total_epochs=2)
    whole = list(data.iterate())
    assert len(whole) == 14 and data.steps_per_epoch(3) == 2
    assert sorted(prompt.uid for prompt in whole[:7]) == [f"e0-f0-r{row}" for row in range(7)]
    assert whole[0].data == {"hint": whole[0].row ** 2} and whole[0].ground_truth == str(whole[0].row)
    again = of_function("user_data:rows", encoder, {"n": 7}, seed=2, total_epochs=2)
    assert list(again.iterate(again.restore(data.state_dict(Cursor(0, 5))))) == whole[5:]
    with pytest.raises(DataError, match="the files were user_data:rows and are user_data:other"):
        of_function("user_data:other", encoder).restore(data.state_dict(Cursor()))


def test_what_numpy_and_pandas_make_of_values_is_understood(user_module: str, encoder: PromptEncoder) -> None:
    prompts = list(of_function("user_data:of_numpy", encoder, shuffle=False).iterate())
    assert [prompt.text for prompt in prompts] == ["a"] * 5
    assert [prompt.ground_truth for prompt in prompts] == ["0.1", "7", "true", "[1, 2]", '{"target": ["x"]}']


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("user_data", "'user_data' is half a name. Write module:function or path/to/file.py:function."),
        ("no_such_module:rows", "no module 'no_such_module' (looked in"),
        ("broken_data:rows", "'broken_data:rows' needs module 'no_such_dependency', which is not installed"),
        ("raising_data:rows", "importing raising_data failed:"),
        ("user_data:row", "has no function 'row' (functions: "),
        ("user_data:value", "is a int, not a function"),
        ("user_data:raises", "user_data:raises raised RuntimeError: no license"),
        ("user_data:number", "returned a int. Return an iterable of dicts"),
        ("user_data:empty", "returned no rows"),
        ("user_data:texts", "row 0 is a str, not a dict"),
        (
            "user_data:no_reward",
            "row 1 has no 'reward' (keys: prompt, answer). Is it 'answer'? Rename it, or set data.rewardKey: answer.",
        ),
        ("user_data:other_shape", "row 1 has another shape than row 0"),
    ],
)
def test_a_function_that_cannot_be_used_says_why(
    user_module: str, encoder: PromptEncoder, spec: str, part: str
) -> None:
    with pytest.raises(DataError) as caught:
        of_function(spec, encoder).scan()
    assert str(caught.value).startswith("data.dataset: ") and part in str(caught.value)
