"""Order, cursor, memory and restore of the prompts."""

import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_worker.data import Cursor, DataOptions, FunctionDataset, PromptDataset, PromptEncoder
from grpo_worker.data.order import KeptRows, permutation, row_order
from grpo_worker.data.reader import RowGroupIndex, RowGroupReader
from grpo_worker.data.schema import check_files
from grpo_worker.errors import DataError

# Of the module, since Arrow keeps only a pointer: a pool that dies before a buffer of it takes the process along.
COUNTING_POOL = pa.proxy_memory_pool(pa.default_memory_pool())


@pytest.fixture
def encoder(plain_tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(plain_tokenizer, 8)


def dataset(files: list[Path], encoder: PromptEncoder, **options: Any) -> PromptDataset:
    return PromptDataset(files, DataOptions(**options), encoder)


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


def test_rows_within_a_row_group_are_shuffled_anew_each_epoch(write_parquet: Any, encoder: PromptEncoder) -> None:
    path = write_parquet(10, row_group_rows=10)
    rows = [prompt.row for prompt in dataset([path], encoder, total_epochs=3).iterate()]
    epochs = [rows[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(order) for order in epochs] == [list(range(10))] * 3
    assert len({tuple(order) for order in [*epochs, list(range(10))]}) == 4


def test_each_row_group_has_its_own_order() -> None:
    orders = [row_order(20, seed=0, epoch=0, block=block, shuffle=True).tolist() for block in range(4)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


def test_row_groups_are_shuffled_anew_each_epoch(write_parquet: Any, encoder: PromptEncoder) -> None:
    path = write_parquet(10, row_group_rows=1)
    rows = [prompt.row for prompt in dataset([path], encoder, total_epochs=3).iterate()]
    epochs = [tuple(rows[start : start + 10]) for start in (0, 10, 20)]
    assert len({*epochs, tuple(range(10))}) == 4


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


def test_seeking_reads_only_the_row_groups_that_are_left(
    two_files: list[Path], encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(two_files, encoder, shuffle=False)
    data.scan()
    read: list[int] = []
    select = RowGroupReader.select
    monkeypatch.setattr(RowGroupReader, "select", lambda self, at: (read.append(at), select(self, at))[1])
    assert [prompt.text for prompt in data.iterate(Cursor(0, 12))] == ["b4", "b5"]
    assert read == [5]


def test_only_one_row_group_is_decoded_at_a_time(tmp_path: Path, plain_tokenizer: Any) -> None:
    """Twelve row groups of 4 MiB: Arrow holds one decoded, and at most a chunk of rows taken from it (1.25 in all)."""
    path, group_rows, groups = tmp_path / "large.parquet", 1024, 12
    schema = pa.schema([("prompt", pa.string()), ("reward", pa.string()), ("blob", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:
        for group in range(groups):
            blobs = [os.urandom(2048).hex() for _ in range(group_rows)]
            rows = {"prompt": [f"{group}"] * group_rows, "reward": ["1"] * group_rows, "blob": blobs}
            writer.write_table(pa.table(rows, schema=schema))
    del rows, blobs
    group_bytes = group_rows * 4096
    data = PromptDataset([path], DataOptions(seed=1, total_epochs=2), PromptEncoder(plain_tokenizer, 8))
    pool, before = COUNTING_POOL, pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert data.scan().kept == group_rows * groups
        scanned_bytes = pool.max_memory()
        assert sum(1 for _ in data.iterate()) == 2 * group_rows * groups
        iterated_bytes = pool.max_memory()
        assert pool.bytes_allocated() == 0
    finally:
        pa.set_memory_pool(before)
    assert scanned_bytes < group_bytes / 4, "the scan reads the prompt and the ground truth only"
    assert group_bytes <= iterated_bytes < 1.75 * group_bytes, "a second decoded row group would make it 2 or more"


def test_the_kept_rows_take_a_bit_each() -> None:
    import numpy as np

    mask = np.arange(1001) % 3 == 0
    kept = KeptRows(mask)
    assert (kept.mask() == mask).all() and kept.count == 334 and len(kept.tobytes()) == 126


def test_empty_row_groups_are_passed_over(tmp_path: Path, encoder: PromptEncoder) -> None:
    path, schema = tmp_path / "gaps.parquet", pa.schema([("prompt", pa.string()), ("reward", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for prompts in (["a"], [], ["b", "c"]):
            writer.write_table(pa.table({"prompt": prompts, "reward": ["1"] * len(prompts)}, schema=schema))
    assert len(RowGroupIndex.of(check_files([path], DataOptions()))) in (2, 3)
    prompts = dataset([path], encoder, shuffle=False).iterate()
    assert [(prompt.row, prompt.text) for prompt in prompts] == [(0, "a"), (1, "b"), (2, "c")]


@pytest.mark.parametrize(
    ("rewards", "texts"),
    [
        (["42", " x "], ["42", " x "]),
        ([42, -7], ["42", "-7"]),
        ([42.0, 0.5], ["42", "0.5"]),
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
    options = DataOptions(reward_key="reward_model.ground_truth")
    (prompt,) = PromptDataset([path], options, PromptEncoder(chat_tokenizer, 50)).iterate()
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
    first = PromptDataset([write_parquet(columns)], DataOptions(), PromptEncoder(plain_tokenizer, 8))
    state = first.state_dict(Cursor(0, 3))
    limit = change.get("limit")
    if limit:
        part, limit = "within the length limit, 10 then and 9 now (data.maxPromptLength was 8 and is 2)", 2
    tag, rows = change.get("tag", "p"), change.get("rows", 10)
    columns = {"prompt": [f"{tag}{n}" for n in range(9)] + ["long"] * (rows - 9), "reward": ["1"] * rows}
    path = write_parquet(columns, change.get("name", "train.parquet"))
    second = PromptDataset([path], DataOptions(**change.get("options", {})), PromptEncoder(plain_tokenizer, limit or 8))
    with pytest.raises(DataError) as caught:
        second.restore(state)
    assert "the data is not what the checkpoint was made with" in str(caught.value) and part in str(caught.value)


def test_more_epochs_may_be_asked_for_at_restore(write_parquet: Any, encoder: PromptEncoder) -> None:
    path = write_parquet(10)
    state = dataset([path], encoder).state_dict(Cursor(1, 0))
    longer = dataset([path], encoder, total_epochs=2)
    assert len(list(longer.iterate(longer.restore(state)))) == 10


@pytest.mark.parametrize("state", [{}, {"version": 1, "cursor": {}, "fingerprint": {}}, {"version": 1, "cursor": None}])
def test_a_state_that_cannot_be_read_is_a_data_error(
    write_parquet: Any, encoder: PromptEncoder, state: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="data state cannot be read"):
        dataset([write_parquet(10)], encoder).restore(state)


def test_a_state_of_another_version_is_refused(write_parquet: Any, encoder: PromptEncoder) -> None:
    data = dataset([write_parquet(10)], encoder)
    with pytest.raises(DataError, match="keeps its data state in version 2, this program in 1"):
        data.restore({**data.state_dict(Cursor()), "version": 2})


def test_a_file_that_changes_after_the_scan_is_noticed(write_parquet: Any, encoder: PromptEncoder) -> None:
    data = dataset([write_parquet(10)], encoder)
    data.scan()
    write_parquet(12)
    with pytest.raises(DataError, match="changed while the job was using it"):
        next(data.iterate())


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
    data = FunctionDataset("user_data:rows", DataOptions(seed=2, total_epochs=2), encoder, {"n": 7})
    whole = list(data.iterate())
    assert len(whole) == 14 and data.steps_per_epoch(3) == 2
    assert sorted(prompt.uid for prompt in whole[:7]) == [f"e0-f0-r{row}" for row in range(7)]
    assert whole[0].data == {"hint": whole[0].row ** 2} and whole[0].ground_truth == str(whole[0].row)
    again = FunctionDataset("user_data:rows", DataOptions(seed=2, total_epochs=2), encoder, {"n": 7})
    assert list(again.iterate(again.restore(data.state_dict(Cursor(0, 5))))) == whole[5:]
    with pytest.raises(DataError, match="the files were user_data:rows and are user_data:other"):
        FunctionDataset("user_data:other", DataOptions(), encoder).restore(data.state_dict(Cursor()))


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
        ("user_data:no_reward", "row 1 has no 'reward' (keys: prompt, answer). Add it, or set data.rewardKey."),
    ],
)
def test_a_function_that_cannot_be_used_says_why(
    user_module: str, encoder: PromptEncoder, spec: str, part: str
) -> None:
    with pytest.raises(DataError) as caught:
        FunctionDataset(spec, DataOptions(), encoder)
    assert str(caught.value).startswith("data.dataset: ") and part in str(caught.value)
