"""Validation sees every held-out prompt once and changes nothing that training depends on."""

import dataclasses
import itertools
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np
import pytest
from coordinator_helpers import Engine, answer, prompt, world
from transformers import PreTrainedTokenizerBase

from grpo_worker.config.rollout import ValidationSampling
from grpo_worker.coordinator.groups import Group, Sample
from grpo_worker.coordinator.scoring import Scorer
from grpo_worker.coordinator.validation import Validation, ValidationResult, best_of, by_source, majority, measures
from grpo_worker.errors import DataError
from grpo_worker.protocol.messages import Array, GroupResult, VersionSpan
from grpo_worker.rewards.base import RewardResult
from grpo_worker.rewards.pool import RewardPool

pytestmark = pytest.mark.asyncio

PROMPTS = [prompt(position) for position in range(5)]


def engine(tokenizer: PreTrainedTokenizerBase, failing: set[str] | None = None) -> Engine:
    """Answers "1" to even prompts and "0" to odd ones, each a second time with the other digit."""

    async def behave(self, stream, http, request) -> None:  # type: ignore[no-untyped-def]
        for one in request.prompts:
            if one.id in (failing or set()):
                await self.write(stream, GroupResult(id=one.id, samples=[], error="no", error_kind="prompt_too_long"))
                continue
            result = answer(one, request.sampling.n, self.version)
            right = int(one.id.partition("-")[2]) % 2 == 0
            samples = [
                msgspec.structs.replace(
                    each,
                    token_ids=Array.of(tokenizer("10"[(right + index + 1) % 2])["input_ids"], "int32"),
                    log_probs=Array.of([-1.0], "float32"),
                    versions=[VersionSpan(self.version, 0, 1)],
                )
                for index, each in enumerate(result.samples)
            ]
            await self.write(stream, msgspec.structs.replace(result, samples=samples))
        await self.end(stream, request)

    return Engine("rollout-0", behave)


async def run(
    rewards: Path, tokenizer: PreTrainedTokenizerBase, here_engine: Engine, *, samples: int = 1, atomic: bool = True, function: str = "judge"
) -> ValidationResult:  # fmt: skip
    async with world(here_engine, version=3) as here, RewardPool(f"{rewards}:{function}", {}, 1, 5.0, 60.0) as pool:
        scorer = Scorer(pool, tokenizer, minimum_samples=2, filter_metric="score", max_failure_ratio=0.5)
        try:
            sampled = ValidationSampling(n=samples, temperature=0.7, topP=0.9)
            validation = Validation(PROMPTS, here.options(), sampled, atomic=atomic)
            return await validation.run(here.dispatcher_of, scorer)
        finally:
            assert (scorer.counts.scored, scorer.counts.failed) == (0, 0)  # the step under way knows nothing of it
            await scorer.close()


@pytest.mark.parametrize("atomic", [True, False])
async def test_greedy_pass_at_1_is_the_share_of_right_answers(
    rewards: Path, tokenizer: PreTrainedTokenizerBase, atomic: bool
) -> None:
    served = engine(tokenizer)
    result = await run(rewards, tokenizer, served, atomic=atomic)
    assert result.metrics["val/accuracy/pass@1"] == pytest.approx(3 / 5)
    assert result.metrics == pytest.approx({
        "val/accuracy/pass@1": 0.6, "val/score/pass@1": 0.6, "val/response_length/mean": 1.0, "val/failed/pass@1": 0.0,
    })  # fmt: skip
    assert result.headline == "accuracy 0.600"
    assert sorted(served.asked) == [one.uid for one in PROMPTS]
    assert all(request.sampling.temperature == 0.0 and request.sampling.n == 1 for request in served.requests)
    assert all(one.seed is None for request in served.requests for one in request.prompts)
    assert not any(one.log_probs for request in served.requests for one in request.prompts)
    assert [group.uid for group in result.groups] == [one.uid for one in PROMPTS]


async def test_a_reward_function_without_accuracy_has_a_validation_score_and_no_accuracy(
    rewards: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    result = await run(rewards, tokenizer, engine(tokenizer), samples=3, function="last_digit")
    assert not any("accuracy" in name for name in result.metrics)
    assert result.metrics["val/score/pass@1"] == pytest.approx(1 + 3 / 5)  # one character, and three times a 1
    assert "val/score/mean@3" in result.metrics
    assert result.headline == "score 1.600"


async def test_mean_at_k_is_of_sampled_answers(rewards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    served = engine(tokenizer)
    result = await run(rewards, tokenizer, served, samples=3)
    # An even prompt is right, wrong, right; an odd one wrong, right, wrong.
    assert result.metrics["val/accuracy/mean@3"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 3) / 5)
    assert result.metrics["val/accuracy/pass@1"] == pytest.approx(3 / 5)
    sampled = [request for request in served.requests if request.sampling.n == 3]
    assert {(request.sampling.temperature, request.sampling.top_p) for request in sampled} == {(0.7, 0.9)}


async def test_a_prompt_that_fails_is_left_out_and_counted(rewards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    result = await run(rewards, tokenizer, engine(tokenizer, {"0-1"}))
    assert result.metrics["val/failed/pass@1"] == 1.0
    assert result.metrics["val/accuracy/pass@1"] == pytest.approx(3 / 4)


async def test_validation_without_any_answer_stops_the_job(rewards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"none of 5 prompts.*no"):
        await run(rewards, tokenizer, engine(tokenizer, {one.uid for one in PROMPTS}))


async def test_validation_that_cannot_be_scored_tells_the_reward_functions_error(
    rewards: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=r"(?s)none of 5 prompts.*the verifier is broken"):
        await run(rewards, tokenizer, engine(tokenizer), function="broken")


@pytest.mark.parametrize("values", [[0.0], [1.0, 0.0, 0.0, 1.0, 0.0], [0.25, -1.0, 3.0, 0.25]])
async def test_the_best_of_k_is_the_mean_over_all_choices_of_k(values: list[float]) -> None:
    for k in range(1, len(values) + 1):
        expected = fmean(max(some) for some in itertools.combinations(values, k))
        assert best_of(values, k) == pytest.approx(expected, abs=1e-12)


def rewards_of(*answers: tuple[str | None, float | None]) -> list[RewardResult]:
    return [RewardResult(accuracy or 0.0, accuracy, answer=answer) for answer, accuracy in answers]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("7", 0.0), ("8", 1.0), ("8", 1.0)], 1.0),
        ([("7", 0.0), ("7", 0.0), ("8", 1.0)], 0.0),
        ([("7", 0.0), ("8", 1.0)], 0.5),  # equal votes share
        ([("", 0.0), ("", 0.0), ("8", 1.0)], 1.0),  # no answer is no vote
        ([("", 0.0), ("", 0.0)], 0.0),
        ([("7", 0.0), (None, 1.0)], None),
        ([("7", None)], None),
    ],
)
async def test_the_answer_that_most_samples_gave(
    answers: list[tuple[str | None, float | None]], expected: float | None
) -> None:
    assert majority(rewards_of(*answers)) == expected


def scored(source: str | None, *accuracies: float) -> Group:
    row = dataclasses.replace(prompt(0), data={} if source is None else {"data_source": source})
    group = Group(order=0, prompt=row)
    group.samples = [
        Sample(token_ids=np.zeros(1, np.int32), log_probs=None, finish_reason="stop", versions=[], reward=each)
        for each in rewards_of(*[(str(accuracy), accuracy) for accuracy in accuracies])
    ]
    return group


async def test_what_several_samples_show() -> None:
    groups = [scored(None, 1.0, 0.0, 0.0, 0.0), scored(None, 1.0, 1.0, 0.0, 0.0), scored(None)]
    assert measures(groups, 4) == pytest.approx({
        "failed/mean@4": 1.0, "accuracy/mean@4": 3 / 8, "score/mean@4": 3 / 8,
        # of one right in four: 1 - C(3,2)/C(4,2); of two: 1 - C(2,2)/C(4,2)
        "accuracy/pass@2": (1 / 2 + 5 / 6) / 2, "score/best@2": (1 / 2 + 5 / 6) / 2,
        "accuracy/pass@4": 1.0, "score/best@4": 1.0, "accuracy/maj@4": (0.0 + 0.5) / 2,
    })  # fmt: skip
    three = measures([scored(None, 1.0, 0.0, 0.0), scored(None, 1.0)], 3)
    assert three["accuracy/pass@2"] == pytest.approx(2 / 3)  # the second has not two samples to choose from
    assert {"accuracy/pass@2", "accuracy/pass@3"} <= three.keys() and "accuracy/pass@4" not in three


async def test_each_source_has_its_own_measures_where_there_are_several() -> None:
    several = [scored("openai/gsm8k", 1.0), scored("math", 0.0), scored("math", 1.0)]
    found = by_source_measures(several)
    assert found == {
        "val/accuracy/pass@1": 2 / 3,
        "val/openai/gsm8k/accuracy/pass@1": 1.0,
        "val/math/accuracy/pass@1": 0.5,
    }
    assert by_source_measures(several[1:]) == {"val/accuracy/pass@1": 0.5}
    assert by_source_measures([scored(None, 1.0)]) == {"val/accuracy/pass@1": 1.0}


def by_source_measures(groups: list[Group]) -> dict[str, float]:
    return {
        f"{prefix}/accuracy/pass@1": measures(some, 1)["accuracy/pass@1"] for prefix, some in by_source(groups).items()
    }
