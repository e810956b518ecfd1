"""From scored groups to what the update gets, against numbers worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from coordinator_helpers import prompt, sample

from grpo_worker.algorithms import ESTIMATORS, make_kl_controller
from grpo_worker.config import Spec
from grpo_worker.config.algorithm import Algorithm
from grpo_worker.coordinator.experience import Credited, Experience, assemble, assign_credit
from grpo_worker.coordinator.groups import Group, Sample
from grpo_worker.coordinator.learner import needs_old_log_probs
from grpo_worker.coordinator.schedule import Batch
from grpo_worker.coordinator.step_metrics import (
    experience_metrics,
    extra_reward_metrics,
    group_metrics,
    performance_metrics,
)
from grpo_worker.protocol.messages import Array, LogProbsReply

# Two prompts of two samples each: [response tokens], score.
FIRST = [sample([1, 2], 1.0, log_probs=[-1.0, -2.0], accuracy=1.0), sample([3], 0.0, log_probs=[-0.5])]
SECOND = [sample([4, 5, 6], 3.0, log_probs=[-1.0, -1.0, -1.0]), sample([7], 1.0, log_probs=[-4.0])]


def two_groups() -> list[Group]:
    return [
        Group(order=0, prompt=prompt(0), samples=list(FIRST)),
        Group(order=1, prompt=prompt(1), samples=list(SECOND)),
    ]


def experience(groups_per_mini_batch: int = 2) -> Experience:
    return assemble(two_groups(), groups_per_mini_batch)


def reply(log_probs: list[float] | None, reference: list[float] | None = None) -> LogProbsReply:
    def array(values: list[float] | None) -> Array | None:
        return None if values is None else Array.of(values, "float32")

    return LogProbsReply(log_probs=array(log_probs), entropy=None, ref_log_probs=array(reference), metrics={})


@pytest.mark.parametrize(
    ("spec", "updates", "needed"),
    [
        ({}, 1, False),
        ({}, 2, True),
        ({"actor": {"recomputeOldLogProbs": "always"}}, 1, True),
        ({"actor": {"useKLLoss": True}}, 1, False),
        ({"algorithm": {"rolloutCorrection": {"rolloutRs": ["token_k1"]}}}, 1, True),
        ({"algorithm": {"rolloutCorrection": {"rolloutIsBatchNormalize": True}}}, 1, True),
        ({"algorithm": {"rolloutCorrection": {"rolloutIsBatchNormalize": True, "rolloutIs": "none"}}}, 1, False),
        ({"algorithm": {"useKLInReward": True}}, 1, True),
        ({"algorithm": {"rolloutCorrection": {"bypassMode": True}}}, 2, False),
    ],
    ids=str,
)
def test_which_steps_take_a_pass_for_old_log_probs(spec: dict[str, Any], updates: int, needed: bool) -> None:
    assert needs_old_log_probs(Spec.model_validate({"model": {"path": "m"}} | spec), updates) is needed


OLD = [-1.0, -2.0, -0.5, -1.0, -1.0, -1.0, -4.0]  # as the engine said: no correction


def credited(
    log_probs: LogProbsReply | None = None, *, controller: Any = None, limit: int = 10, **algorithm: Any
) -> Credited:
    settings = Algorithm.model_validate(algorithm)
    return assign_credit(
        experience(),
        log_probs or reply(OLD),
        settings,
        ESTIMATORS[settings.advantage_estimator],
        controller or make_kl_controller("fixed", 0.1, horizon=100, target_kl=0.1),
        limit,
    )


def test_sequences_are_flat_in_the_order_of_groups() -> None:
    made = experience()
    assert made.prompt_lengths.tolist() == [2, 2, 2, 2]
    assert made.response_lengths.tolist() == [2, 1, 3, 1]
    assert made.token_ids.tolist() == [10, 7, 1, 2, 10, 7, 3, 11, 7, 4, 5, 6, 11, 7, 7]
    assert made.token_ids.dtype == np.int32
    assert made.seq_ids.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert made.group_ids.tolist() == [0, 0, 1, 1]
    assert made.scores.tolist() == [1.0, 0.0, 3.0, 1.0]
    assert made.accuracies.tolist()[0] == 1.0
    assert all(math.isnan(value) for value in made.accuracies.tolist()[1:])
    assert made.rollout_log_probs.tolist() == OLD
    assert made.sequences == 4


@pytest.mark.parametrize(("groups_per_mini_batch", "sequences"), [(1, [2, 2]), (2, [4]), (3, [4])])
def test_a_group_is_never_split_over_two_updates(groups_per_mini_batch: int, sequences: list[int]) -> None:
    assert experience(groups_per_mini_batch).mini_batch_sequences == sequences


def test_a_group_that_lost_samples_counts_those_that_are_left() -> None:
    groups = [*two_groups(), Group(order=2, prompt=prompt(2), samples=[sample([1], 0.0)] * 3)]
    assert assemble(groups, 2).mini_batch_sequences == [4, 3]
    assert assemble(groups, 1).mini_batch_sequences == [2, 2, 3]


@pytest.mark.parametrize(
    ("groups", "at_most", "sizes"),
    [(33, 32, [17, 16]), (64, 32, [32, 32]), (65, 32, [22, 22, 21]), (5, 32, [5]), (7, 2, [2, 2, 2, 1])],
)
def test_no_update_of_a_step_is_much_smaller_than_the_others(groups: int, at_most: int, sizes: list[int]) -> None:
    made = [Group(order=order, prompt=prompt(order), samples=[sample([1], 0.0)] * 2) for order in range(groups)]
    assert assemble(made, at_most).mini_batch_sequences == [2 * size for size in sizes]


def test_grpo_compares_a_sample_with_its_group() -> None:
    result = credited(normAdvByStd=False)
    assert result.advantages.tolist() == [0.5, 0.5, -0.5, 1.0, 1.0, 1.0, -1.0]
    normed = credited().advantages
    # Two samples r1 > r2: the deviation is (r1 - r2) / 2, the standard deviation with n - 1 is (r1 - r2) / sqrt(2).
    torch.testing.assert_close(normed.abs(), torch.full((7,), 1 / math.sqrt(2)), atol=1e-5, rtol=0)


def test_the_reward_sits_on_the_last_token() -> None:
    assert credited().token_rewards.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 3.0, 1.0]


def test_the_engines_log_probs_stand_in_bypass_mode() -> None:
    result = assign_credit(
        experience(),
        None,
        Algorithm.model_validate({"rolloutCorrection": {"bypassMode": True}}),
        ESTIMATORS["grpo"],
        make_kl_controller("fixed", 0.1, horizon=100, target_kl=0.1),
        10,
    )
    assert result.old_log_probs.tolist() == OLD
    assert result.is_weights.tolist() == [1.0] * 7
    assert result.ref_log_probs is None


def test_kl_in_the_reward_is_taken_from_each_token() -> None:
    reference = [-1.5, -2.0, -0.5, -1.0, -3.0, -1.0, -4.0]  # k1: 0.5 on the first token, 2 on the fifth
    controller = make_kl_controller("adaptive", 0.1, horizon=100, target_kl=0.1)
    result = credited(
        reply(OLD, reference), useKLInReward=True, klPenalty="k1", controller=controller, normAdvByStd=False
    )
    expected = [0.0 - 0.05, 1.0, 0.0, 0.0, -0.2, 3.0, 1.0]
    torch.testing.assert_close(result.token_rewards, torch.tensor(expected))
    # The batch's KL: mean over sequences of their mean over tokens.
    batch_kl = (0.25 + 0.0 + 2 / 3 + 0.0) / 4
    assert result.metrics["actor/reward_kl_penalty"] == pytest.approx(batch_kl)
    assert result.metrics["actor/reward_kl_penalty_coeff"] == 0.1  # of this step; the controller moves after it
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.2 * 4 / 100))
    assert result.ref_log_probs is not None
    first = (0.95 - 0.0) / 2
    torch.testing.assert_close(result.advantages[:3], torch.tensor([first, first, -first]))


@pytest.mark.parametrize(
    ("limit", "buffer", "penalties"),
    [
        (10, None, [0.0, 0.0, 0.0, 0.0]),  # a fifth: the last 2 tokens
        (4, 2, [0.0, 0.0, -0.5, 0.0]),
        (3, 3, [-2 / 3, -1 / 3, -1.0, -1 / 3]),
    ],
)
def test_a_long_answer_is_penalised_over_the_last_tokens(
    limit: int, buffer: int | None, penalties: list[float]
) -> None:
    overlong = {"enable": True} | ({} if buffer is None else {"length": buffer})
    result = credited(overlongBuffer=overlong, advantageEstimator="reinforce", limit=limit)
    rewards = [score + penalty for score, penalty in zip([1.0, 0.0, 3.0, 1.0], penalties, strict=True)]
    by_token = [reward for reward, length in zip(rewards, [2, 1, 3, 1], strict=True) for _ in range(length)]
    torch.testing.assert_close(result.advantages, torch.tensor(by_token))
    assert result.metrics["reward/overlong_penalty/mean"] == pytest.approx(sum(penalties) / 4)


def test_a_token_that_the_trainer_likes_more_than_the_engine_weighs_more_up_to_the_threshold() -> None:
    old = [-1.0 + math.log(1.5), -2.0 + math.log(8.0), -0.5 - math.log(4.0), *OLD[3:]]
    result = credited(reply(old), rolloutCorrection={"rolloutIs": "token", "rolloutIsThreshold": 2.0})
    torch.testing.assert_close(result.is_weights, torch.tensor([1.5, 2.0, 0.25, 1.0, 1.0, 1.0, 1.0]))
    assert result.mask.all()


def test_a_lower_threshold_makes_outliers_zero() -> None:
    old = [-1.0 + math.log(1.5), -2.0 + math.log(8.0), -0.5 - math.log(4.0), *OLD[3:]]
    correction = {"rolloutIs": "token", "rolloutIsThreshold": 2.0, "rolloutIsLowerThreshold": 0.5}
    torch.testing.assert_close(
        credited(reply(old), rolloutCorrection=correction).is_weights, torch.tensor([1.5, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    )


def test_rejected_tokens_leave_the_mask_and_the_wire_says_so() -> None:
    old = [-1.0, -2.0 + 3.0, *OLD[2:]]
    result = credited(reply(old), rolloutCorrection={"rolloutIs": "none", "rolloutRs": ["token_k2"], "rolloutRsThreshold": 2.0})  # fmt: skip
    assert result.mask.tolist() == [True, False, True, True, True, True, True]  # d = 3: d^2 / 2 = 4.5 > 2
    wire = result.wire()
    assert wire.response_mask is not None
    assert wire.response_mask.numpy().tolist() == [1, 0, 1, 1, 1, 1, 1]
    assert wire.is_weights is not None
    assert wire.is_weights.numpy().tolist() == [1.0] * 7


def test_the_wire_carries_advantages_and_weights() -> None:
    result = credited()
    wire = result.wire()
    assert wire.prompt_lengths.numpy().tolist() == [2, 2, 2, 2]
    assert wire.response_lengths.numpy().tolist() == [2, 1, 3, 1]
    assert wire.token_ids.numpy().tolist() == result.experience.token_ids.tolist()
    assert wire.mini_batch_sequences == [4]
    assert wire.old_log_probs is not None
    assert wire.advantages is not None
    assert wire.old_log_probs.numpy().tolist() == OLD
    np.testing.assert_array_equal(wire.advantages.numpy(), result.advantages.numpy())
    assert wire.ref_log_probs is None


def test_metrics_of_an_experience_are_those_of_the_numbers() -> None:
    metrics = experience_metrics(credited(normAdvByStd=False), 3)
    expected = {
        "critic/score/mean": 1.25, "critic/score/max": 3.0, "critic/score/min": 0.0,
        "critic/rewards/mean": 1.25,
        "critic/advantages/mean": (0.5 + 0.5 - 0.5 + 1 + 1 + 1 - 1) / 7, "critic/advantages/max": 1.0, "critic/advantages/min": -1.0,
        "response_length/mean": 7 / 4, "response_length/max": 3.0, "response_length/min": 1.0, "response_length/clip_ratio": 0.25,
        "prompt_length/mean": 2.0,
        "critic/accuracy/mean": 1.0,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_metrics_of_groups_count_staleness_and_what_was_left_out() -> None:
    ready = [
        Group(order=0, prompt=prompt(0), samples=[sample([1], 1.0, version=3), sample([1], 1.0, version=5)]),
        Group(order=1, prompt=prompt(1), samples=[sample([1], 1.0, version=5), sample([1], 0.0, version=5)]),
    ]
    batch = Batch(ready, [Group(order=2, prompt=prompt(2))], [Group(order=3, prompt=prompt(3))] * 2)
    metrics = group_metrics(batch, 5)
    prefix = "training/off_policy/trajectory_staleness"
    assert (metrics[f"{prefix}/mean"], metrics[f"{prefix}/max"], metrics[f"{prefix}/min"]) == (0.5, 2.0, 0.0)
    assert metrics["training/filter_groups/kept"] == 2
    assert metrics["training/filter_groups/filtered"] == 1
    assert metrics["training/rollout_failure/evicted_prompts"] == 2
    assert metrics["training/zero_variance_groups"] == 0.5


def test_scores_before_the_filter_include_what_it_left_out() -> None:
    def group(order: int, *scores: float, accuracies: tuple[float, ...] = ()) -> Group:
        given = accuracies or (None,) * len(scores)
        samples = [sample([1], score, accuracy=accuracy) for score, accuracy in zip(scores, given, strict=True)]
        return Group(order=order, prompt=prompt(order), samples=samples)

    ready = [group(0, 1.0, 0.0), group(1, 0.5, 0.0)]
    filtered = [group(2, 1.0, 1.0), group(3, 0.0, 0.0), group(4, 0.0, 0.0), group(5, 0.3, 0.3, accuracies=(1.0, 1.0))]
    metrics = group_metrics(Batch(ready, filtered, []), 5)
    assert metrics["training/filter_groups/score/mean"] == pytest.approx((1.0 + 0.5 + 2.0 + 0.6) / 12)
    assert (metrics["training/filter_groups/score/min"], metrics["training/filter_groups/score/max"]) == (0.0, 1.0)
    assert metrics["reward/solve_all"] == 2 / 6  # one by its accuracy
    assert metrics["reward/solve_none"] == 2 / 6


def test_further_numbers_of_the_reward_function_are_averaged_by_name() -> None:
    samples = [sample([1], 1.0, extra={"format": 1.0}), sample([1], 0.0, extra={"format": 0.0, "steps": 7.0})]
    assert extra_reward_metrics([Group(order=0, prompt=prompt(0), samples=samples)]) == {
        "reward/format/mean": 0.5,
        "reward/steps/mean": 7.0,
    }


def test_throughput_counts_prompt_and_response_tokens_a_second_and_gpu() -> None:
    metrics = performance_metrics(experience(), {"gen": 0.7, "update_actor": 1.5, "step": 3.0}, gpus=5)
    assert metrics["perf/total_num_tokens"] == 15
    assert metrics["perf/throughput"] == 15 / 3.0 / 5
    assert metrics["timing_per_token_ms/gen"] == pytest.approx(100.0)  # seven response tokens
    assert metrics["timing_per_token_ms/update_actor"] == pytest.approx(100.0)
    assert metrics["timing_s/gen"] == 0.7


def observed(tokens: list[int], mask: list[int], score: float, log_probs: list[float]) -> Sample:
    """A sample of an agent's: what has mask 0 was observed."""
    made = sample(tokens, score, log_probs=log_probs)
    return replace(made, mask=np.array(mask, dtype=bool), turns=2)


# The samples of `two_groups`, with observations before, between and behind their tokens.
MASKS = [[1, 0, 0, 1], [0, 1, 0], [1, 1, 0, 1], [1, 0]]
OBSERVED = [
    Group(order=0, prompt=prompt(0), samples=[
        observed([1, 9, 9, 2], MASKS[0], 1.0, [-1.0, 0.0, 0.0, -2.0]), observed([9, 3, 9], MASKS[1], 0.0, [0.0, -0.5, 0.0]),
    ]),
    Group(order=1, prompt=prompt(1), samples=[
        observed([4, 5, 9, 6], MASKS[2], 3.0, [-1.0, -1.0, 0.0, -1.0]), observed([7, 9], MASKS[3], 1.0, [-4.0, 0.0]),
    ]),
]  # fmt: skip
SAMPLED = torch.tensor([bit for mask in MASKS for bit in mask], dtype=torch.bool)


def among_observed(values: list[float], filler: float) -> list[float]:
    """Values of sampled tokens, with `filler` at the observed ones."""
    rest = iter(values)
    return [next(rest) if bit else filler for bit in SAMPLED.tolist()]


@pytest.mark.parametrize("kl_in_reward", [False, True])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_observed_tokens_change_nothing_of_what_sampled_ones_get(estimator: str, kl_in_reward: bool) -> None:
    old = [-1.1, -2.2, -0.4, -1.0, -0.7, -1.3, -3.5]
    reference = [-1.5, -2.0, -0.6, -1.1, -3.0, -1.0, -4.0]
    correction = {"rolloutIs": "sequence", "rolloutIsBatchNormalize": True, "rolloutRs": ["seq_mean_k3"], "rolloutRsThreshold": 0.5}  # fmt: skip
    settings = Algorithm.model_validate(
        {"advantageEstimator": estimator, "useKLInReward": kl_in_reward, "klPenalty": "k2", "rolloutCorrection": correction}
    )  # fmt: skip
    results = []
    for groups, fill in ((two_groups(), lambda values, filler: values), (OBSERVED, among_observed)):
        controller = make_kl_controller("adaptive", 0.1, horizon=100, target_kl=0.1)
        log_probs = reply(fill(old, -50.0), fill(reference, -0.1))
        credited = assign_credit(assemble(groups, 2), log_probs, settings, ESTIMATORS[estimator], controller, 10)
        results.append((credited, controller.coefficient))
    (plain, coefficient), (agents, agents_coefficient) = results
    assert agents.experience.mask.tolist() == SAMPLED.tolist()
    torch.testing.assert_close(agents.advantages[SAMPLED], plain.advantages)
    torch.testing.assert_close(agents.is_weights[SAMPLED], plain.is_weights)
    assert agents.mask[SAMPLED].tolist() == plain.mask.tolist()
    for values in (agents.advantages, agents.is_weights, agents.mask):
        assert not values[~SAMPLED].any()
    assert agents_coefficient == pytest.approx(coefficient)
    assert agents.metrics == pytest.approx(plain.metrics)


def test_an_agents_metrics_tell_sampled_from_observed_tokens() -> None:
    made = assemble(OBSERVED, 2)
    metrics = experience_metrics(
        assign_credit(made, None, Algorithm(), ESTIMATORS["grpo"], make_kl_controller("fixed", 0.1, horizon=1, target_kl=1), 10), 10
    )  # fmt: skip
    expected = {
        "agent/turns/mean": 2.0, "agent/sampled_tokens/mean": 7 / 4, "agent/sampled_tokens/max": 3.0, "agent/observed_tokens/mean": 6 / 4,
        "response_length/mean": 13 / 4,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert performance_metrics(made, {"gen": 0.7, "step": 3.0}, 1)["timing_per_token_ms/gen"] == pytest.approx(100.0)
    assert not any(name.startswith("agent/") for name in experience_metrics(credited(), 3))


def test_the_trainer_is_told_which_tokens_were_observed() -> None:
    wire = assemble(OBSERVED, 2).wire()
    assert wire.response_mask is not None
    assert wire.response_mask.numpy().tolist() == SAMPLED.to(torch.uint8).tolist()
    assert wire.response_lengths.numpy().tolist() == [4, 3, 4, 2]
