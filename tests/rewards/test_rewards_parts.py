"""Several rewards of one response: their sum, who is asked for which source, and what is told of each."""

from pathlib import Path
from typing import Any

import pytest

from grpo_worker.errors import DataError
from grpo_worker.rewards.base import RewardFunction, RewardInput
from grpo_worker.rewards.lookup import PARTS, resolve
from grpo_worker.rewards.pool import RewardPool

MODULE = """
from grpo_worker.rewards.base import RewardResult
def short(sample, limit=4):
    return {"score": float(len(sample.response) <= limit), "length": len(sample.response)}
def half(sample):
    return RewardResult(0.5, accuracy=0.25)
"""


def part(name: str, function: str, **others: Any) -> dict[str, Any]:
    return {"name": name, "function": function, "options": {}, "weight": 1.0, "sources": [], **others}


def of(*parts: dict[str, Any]) -> RewardFunction:
    return resolve(PARTS, {"parts": list(parts)})


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def sample(response: str = "#### 12", source: str | None = None) -> RewardInput:
    return RewardInput("p", response, "12", {} if source is None else {"data_source": source})


def test_the_score_is_the_weighted_sum_and_each_part_is_told() -> None:
    function = of(
        part("right", "gsm8k", weight=2.0),
        part("short", "parts_module:short", weight=-0.5, options={"limit": 10}),
        part("half", "parts_module:half"),
    )
    result = function(sample())
    assert result.score == 2.0 - 0.5 + 0.5
    assert result.accuracy == 1.0  # of the first that gives one
    assert result.extra == {"right": 1.0, "short": 1.0, "short/length": 7.0, "half": 0.5}


@pytest.mark.parametrize(
    ("source", "judges"),
    [
        ("openai/gsm8k", {"gsm8k", "all"}),
        ("math_dapo", {"math", "all"}),
        ("math", {"math", "all"}),
        ("mathematics/x", {"math", "all"}),
        ("openai/gsm8k2", {"all"}),
        (None, {"all"}),
    ],
)
def test_a_part_is_asked_for_its_sources_alone(source: str | None, judges: set[str]) -> None:
    function = of(
        part("gsm8k", "parts_module:half", sources=["openai/gsm8k"]),
        part("math", "parts_module:half", sources=["other", "math*"]),
        part("all", "parts_module:half"),
    )
    result = function(sample(source=source))
    assert set(result.extra) == judges
    assert result.score == 0.5 * len(judges)


def test_a_source_that_no_part_is_for_is_no_zero() -> None:
    function = of(part("gsm8k", "gsm8k", sources=["openai/gsm8k"]))
    with pytest.raises(
        ValueError, match=r"no part of reward.parts is for data_source 'aime'. Add it to the sources of one"
    ):
        function(sample(source="aime"))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (part("b", "gsm9k"), "reward.parts[1].function: 'gsm9k' is not a built-in reward"),
        (part("b", "parts_module:none"), "reward.parts[1].function: 'parts_module:none': "),
        (part("b", "parts_module:half", options={"x": 1}), "reward.parts[1].options"),
        (part("b", "gsm8k", options={"method": "loose"}), "reward.parts[1].options of 'gsm8k'"),
    ],
)
def test_what_is_wrong_with_a_part_names_it(second: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        of(part("a", "gsm8k"), second)
    assert words in str(caught.value)


@pytest.mark.asyncio
async def test_workers_score_by_parts() -> None:
    parts = {
        "parts": [part("right", "gsm8k", options={"method": "strict"}), part("short", "parts_module:short", weight=0.5)]
    }
    async with RewardPool(PARTS, parts, 1, 5.0, 60.0) as pool:
        outcomes = await pool.score_many([sample("#### 12"), sample("12")])
    assert [outcome.result and (outcome.result.score, outcome.result.extra) for outcome in outcomes] == [
        (1.0, {"right": 1.0, "short": 0.0, "short/length": 7.0}),
        (0.5, {"right": 0.0, "short": 1.0, "short/length": 2.0}),
    ]
