"""What `reward.function` and `reward.options` may say, and what a person reads when they are wrong."""

import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest

from grpo_worker.errors import DataError
from grpo_worker.rewards.base import InvalidRewardError, RewardInput, RewardResult, as_result
from grpo_worker.rewards.lookup import resolve

Make = Callable[..., RewardInput]

USER_MODULE = """
NUMBER = 3

def length_reward(sample, weight=1.0):
    return weight * len(sample.response)

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return {"score": float(solution_str == ground_truth), "acc": True, "pred": solution_str,
            "index": extra_info["index"], "known": data_source == "openai/gsm8k"}

def short(solution_str, ground_truth, bonus):
    return float(solution_str == ground_truth) + bonus

def anything(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return kwargs["bonus"]

def two_things(sample, tokenizer):
    return 0.0

async def waiting(sample):
    return 0.0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's current directory; what the test imported from it is forgotten afterwards."""
    (tmp_path / "user_rewards.py").write_text(USER_MODULE)
    (tmp_path / "broken.py").write_text("import math\n\nTABLE = {}['missing key']\n")
    (tmp_path / "needy.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name", ["user_rewards:length_reward", "user_rewards.py:length_reward", "./user_rewards.py:length_reward"]
)
def test_a_users_function_is_found_by_module_and_by_file(sample: Make, name: str) -> None:
    assert resolve(name, {"weight": 0.5})(sample("four")) == RewardResult(2.0)


def test_a_file_may_import_its_neighbours(folder: Path, sample: Make) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "near.py").write_text("SCORE = 3.0\n")
    (folder / "sub" / "my_reward.py").write_text("from near import SCORE\n\ndef reward(sample):\n    return SCORE\n")
    assert resolve("sub/my_reward.py:reward")(sample("")).score == 3.0


def test_a_file_named_like_a_standard_module_hides_nothing(folder: Path, sample: Make) -> None:
    (folder / "json.py").write_text("def reward(sample):\n    return 5.0\n")
    assert resolve("json.py:reward")(sample("")).score == 5.0
    assert "loads" in vars(sys.modules["json"])


def test_a_verl_function_works_unchanged(sample: Make) -> None:
    function = resolve("user_rewards:compute_score")
    result = function(sample("42", "42", data_source="openai/gsm8k", extra_info={"index": 7}))
    assert result == RewardResult(1.0, accuracy=1.0, extra={"index": 7.0, "known": 1.0})


@pytest.mark.parametrize(("name", "score"), [("user_rewards:short", 1.25), ("user_rewards:anything", 0.25)])
def test_a_verl_function_gets_the_arguments_that_it_takes_and_the_options(
    sample: Make, name: str, score: float
) -> None:
    assert resolve(name, {"bonus": 0.25})(sample("a", "a")).score == score


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("gsm8", {}, ["'gsm8' is not a built-in reward", "Did you mean 'gsm8k'?", "module:function"]),
        ("user_rewards:", {}, ["half a name"]),
        (
            "user_reward:f",
            {},
            ["no module 'user_reward'", "current directory", "PYTHONPATH", "Did you mean 'user_rewards'?"],
        ),
        ("no.such.module:f", {}, ["no module 'no'", "path/to/file.py:f"]),
        ("user_reward.py:f", {}, ["there is no file", "user_rewards.py", "Did you mean 'user_rewards.py'?"]),
        (
            "user_rewards:lenght_reward",
            {},
            ["has no function 'lenght_reward'", "compute_score", "mean 'length_reward'?"],
        ),
        ("user_rewards:NUMBER", {}, ["'NUMBER'", "is a int, not a function"]),
        ("user_rewards:two_things", {}, ["missing a required argument: 'tokenizer'", "verl's", "reward.options"]),
        ("user_rewards:short", {}, ["missing a required argument: 'bonus'"]),
        ("broken:f", {}, ["importing broken failed", "broken.py", "line 3", "KeyError: 'missing key'"]),
        ("broken.py:f", {}, ["broken.py failed", "KeyError: 'missing key'"]),
        ("needy:f", {}, ["needs module 'a_package_nobody_has'", "needy.py"]),
        ("user_rewards:length_reward", {"wieght": 1}, ["reward.options.wieght", "options: weight", "mean 'weight'?"]),
        ("user_rewards:compute_score", {"solution_str": ""}, ["reward.options.solution_str"]),
        ("gsm8k", {"metod": "strict"}, ["reward.options"]),
        ("gsm8k", {"method": "loose"}, ["reward.options of 'gsm8k'", "'loose' is not one of strict, flexible"]),
        ("format", {"pattern": "(<think>"}, ["reward.options of 'format'", "not a regular expression"]),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(name: str, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as error:
        resolve(name, options)
    assert str(error.value).startswith("reward.")
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (1, RewardResult(1.0)),
        (True, RewardResult(1.0)),
        (numpy.float32(0.5), RewardResult(0.5)),
        (numpy.array([0.5]), RewardResult(0.5)),
        (numpy.bool_(True), RewardResult(1.0)),
        (Fraction(1, 2), RewardResult(0.5)),
        ({"score": 1, "acc": None}, RewardResult(1.0)),
        ({"score": 1, "acc": False, "n": 2, "pred": "x", "nan": float("nan")}, RewardResult(1.0, 0.0, {"n": 2.0})),
        (RewardResult(1, True, {"n": 2}), RewardResult(1.0, 1.0, {"n": 2.0})),
    ],
)
def test_a_number_of_any_kind_is_a_score(value: object, result: RewardResult) -> None:
    assert as_result(value) == result


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "NoneType"),
        ("1.0", "not a number: str '1.0'"),
        (float("nan"), "nan, not a finite number"),
        ({"score": float("-inf")}, "-inf, not a finite number"),
        ({"acc": 1}, r"no 'score' \(keys: acc\)"),
        ({"score": 1, "acc": float("nan")}, "the acc is nan"),
        (RewardResult(float("nan")), "nan"),
        ([1.0], "not a number: list"),
        (numpy.array([1.0, 2.0]), "not a number: ndarray"),
        (Decimal("NaN"), "not a"),
    ],
)
def test_anything_else_is_invalid_and_says_what_came_back(value: object, message: str) -> None:
    with pytest.raises(InvalidRewardError, match=message):
        as_result(value)
