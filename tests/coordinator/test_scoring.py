"""Samples that cannot be scored are left out and counted, never scored zero; the real pool does the scoring."""

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from coordinator_helpers import prompt, sample
from transformers import PreTrainedTokenizerBase

from grpo_worker.coordinator.groups import Group, GroupState
from grpo_worker.coordinator.scoring import Scorer
from grpo_worker.errors import DataError
from grpo_worker.rewards.pool import RewardPool

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def scoring(
    rewards: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    minimum: int = 2,
    metric: str | None = None,
    ratio: float = 0.5,
    function: str = "judge",
) -> AsyncIterator[Scorer]:
    async with RewardPool(f"{rewards}:{function}", {}, 1, 0.5, 60.0) as pool:
        scorer = Scorer(pool, tokenizer, minimum_samples=minimum, filter_metric=metric, max_failure_ratio=ratio)
        try:
            yield scorer
        finally:
            await scorer.close()


def group(tokenizer: PreTrainedTokenizerBase, *responses: str, order: int = 0) -> Group:
    """A generated group whose responses are these texts, with an end-of-sequence token behind each."""
    eos = tokenizer.eos_token_id
    samples = [sample([*tokenizer(text)["input_ids"], eos], None) for text in responses]
    return Group(order=order, prompt=prompt(order), state=GroupState.SCORING, samples=samples)


async def ended(scorer: Scorer, *groups: Group) -> list[Group]:
    """Submit the groups and wait until each has ended."""
    done: list[Group] = []
    everything = asyncio.Event()

    def on_end(group: Group) -> None:
        done.append(group)
        if len(done) == len(groups):
            everything.set()

    for one in groups:
        scorer.submit(one, on_end)
    async with asyncio.timeout(30):
        await everything.wait()
    return done


async def test_a_sample_gets_its_text_and_its_reward(rewards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    async with scoring(rewards, tokenizer) as scorer:
        (one,) = await ended(scorer, group(tokenizer, "1", "0.5", "0"))
    assert one.state is GroupState.READY
    assert [sample.text for sample in one.samples] == ["1", "0.5", "0"]  # without the special token
    results = [sample.reward for sample in one.samples]
    assert [(r.score, r.accuracy) for r in results if r] == [(1.0, 1.0), (0.5, 1.0), (0.0, 0.0)]
    assert all(r.extra == {"seen": 1.0} for r in results if r)
    assert scorer.take_counts().failed == 0


async def test_a_thinking_tag_that_is_a_special_token_is_seen_by_the_format(tokenizer: PreTrainedTokenizerBase) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    async with RewardPool("format", {}, 1, 5.0, 60.0) as pool:
        scorer = Scorer(pool, thinking, minimum_samples=2, filter_metric=None, max_failure_ratio=0.5)
        (one,) = await ended(scorer, group(thinking, "<think>1</think><answer>2</answer>", "1 2"))
        await scorer.close()
    assert [sample.text for sample in one.samples] == ["12", "1 2"]
    assert [sample.raw_text for sample in one.samples] == ["<think>1</think><answer>2</answer>", "1 2"]
    assert [sample.reward.score for sample in one.samples if sample.reward] == [1.0, 0.0]


async def test_a_response_that_was_cut_off_keeps_its_last_token(
    rewards: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    async with scoring(rewards, tokenizer) as scorer:
        cut = group(tokenizer, "1", "0")
        for each in cut.samples:
            each.token_ids = each.token_ids[:-1]
        (one,) = await ended(scorer, cut)
    assert [sample.raw_text for sample in one.samples] == ["1", "0"]


async def test_samples_that_cannot_be_scored_are_left_out_and_counted_by_kind(
    rewards: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    async with scoring(rewards, tokenizer, ratio=0.9) as scorer:
        (one,) = await ended(scorer, group(tokenizer, "1", "raise", "nan", "exit", "hang", "0"))
        counts = scorer.take_counts()
    assert one.state is GroupState.READY
    assert [sample.text for sample in one.samples] == ["1", "0"]
    assert (counts.scored, counts.failed) == (2, 4)
    assert counts.kinds == {"exception": 1, "invalid": 1, "crash": 1, "timeout": 1}
    assert "prompt 0-0" in counts.last_message


@pytest.mark.parametrize(
    ("responses", "minimum", "state"),
    [
        (["1", "raise"], 2, GroupState.FAILED),
        (["raise", "raise"], 2, GroupState.FAILED),
        (["1"], 1, GroupState.READY),
        (["raise"], 1, GroupState.FAILED),
    ],
)
async def test_a_group_with_too_few_samples_left_has_failed(
    rewards: Path, tokenizer: PreTrainedTokenizerBase, responses: list[str], minimum: int, state: GroupState
) -> None:
    async with scoring(rewards, tokenizer, minimum=minimum) as scorer:
        (one,) = await ended(scorer, group(tokenizer, *responses))
    assert one.state is state
    if state is GroupState.FAILED:
        assert "the verifier is broken" in one.failure


@pytest.mark.parametrize(
    ("responses", "metric", "state"),
    [
        (["1", "1"], None, GroupState.READY),
        (["1", "1"], "score", GroupState.FILTERED),
        (["1", "2"], "score", GroupState.READY),
        (["1", "2"], "accuracy", GroupState.FILTERED),  # both right, with another score
        (["half1", "half2"], "accuracy", GroupState.FILTERED),
        (["1", "0"], "accuracy", GroupState.READY),
        (["1", "raise", "1"], "score", GroupState.FILTERED),  # what failed is no variance
    ],
)
async def test_dynamic_sampling_filters_groups_without_variance(
    rewards: Path, tokenizer: PreTrainedTokenizerBase, responses: list[str], metric: str | None, state: GroupState
) -> None:
    async with scoring(rewards, tokenizer, metric=metric) as scorer:
        (one,) = await ended(scorer, group(tokenizer, *responses))
    assert one.state is state


@pytest.mark.parametrize(
    ("responses", "ratio", "stops"),
    [
        (["1", "raise"], 0.5, False),
        (["1", "raise", "raise"], 0.5, True),
        (["1", "0", "raise"], 0.0, True),
        (["1", "0"], 0.0, False),
        (["raise", "raise"], 1.0, False),
    ],
)
async def test_too_many_failures_in_a_step_stop_the_job(
    rewards: Path, tokenizer: PreTrainedTokenizerBase, responses: list[str], ratio: float, stops: bool
) -> None:
    async with scoring(rewards, tokenizer, ratio=ratio) as scorer:
        await ended(scorer, group(tokenizer, *responses))
        if not stops:
            scorer.take_counts()
            return
        with pytest.raises(DataError, match=r"reward\.function: \S+:judge: . of . samples.*exception.*reward\.maxFailureRatio") as caught:  # fmt: skip
            scorer.take_counts()
    assert "the verifier is broken" in str(caught.value)


async def test_counts_are_of_one_step(rewards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    async with scoring(rewards, tokenizer) as scorer:
        await ended(scorer, group(tokenizer, "1", "0", "raise"))
        assert scorer.take_counts().failed == 1
        assert scorer.take_counts().scored == 0


async def test_many_groups_at_once_keep_their_own_rewards(rewards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    groups = [group(tokenizer, str(order), str(order + 1), order=order) for order in range(30)]
    async with scoring(rewards, tokenizer) as scorer:
        done = await ended(scorer, *groups)
    assert sorted(one.order for one in done) == list(range(30))
    for one in groups:
        assert [s.reward.score for s in one.samples if s.reward] == [one.order, one.order + 1]


async def test_what_goes_wrong_in_the_background_is_raised_in_the_loop(
    rewards: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    async with scoring(rewards, tokenizer) as scorer:
        scorer.raise_failure()
        bad = group(tokenizer, "1", "0")
        bad.samples[0].token_ids = None  # type: ignore[assignment]
        scorer.submit(bad, lambda one: None)
        async with asyncio.timeout(10):
            while scorer._error is None:
                await asyncio.sleep(0)
        with pytest.raises(AttributeError):
            scorer.raise_failure()
