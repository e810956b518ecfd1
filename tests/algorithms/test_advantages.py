"""Advantages against the formulas of the papers, written over Python lists."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from grpo_worker.algorithms import ESTIMATORS, AdvantageInputs, checked, outcome_rewards
from grpo_worker.algorithms.advantages import discounted_returns, grpo, reinforce, rloo, whiten
from grpo_worker.errors import DataError

# Groups are interleaved on purpose: nothing may depend on the order of the sequences.
REWARDS = [1.0, 0.25, 0.0, 0.5, 1.0, -2.0]
GROUPS = [7, 3, 7, 3, 7, 3]


def f64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def members(group: int) -> list[float]:
    return [reward for reward, g in zip(REWARDS, GROUPS, strict=True) if g == group]


def batch(
    rewards: list[float], lengths: list[int], groups: list[int], mask: list[float] | None = None, **options: object
) -> AdvantageInputs:
    seq_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return AdvantageInputs(
        sequence_rewards=f64(rewards),
        token_rewards=outcome_rewards(f64(rewards), seq_ids),
        mask=f64(mask) if mask is not None else torch.ones(len(seq_ids), dtype=torch.float64),
        seq_ids=seq_ids,
        group_ids=torch.tensor(groups),
        **options,  # type: ignore[arg-type]
    )


def test_grpo_is_the_reward_in_units_of_the_groups_unbiased_std() -> None:
    expected = [
        (reward - statistics.mean(members(group))) / (statistics.stdev(members(group)) + 1e-6)
        for reward, group in zip(REWARDS, GROUPS, strict=True)
    ]
    torch.testing.assert_close(grpo(f64(REWARDS), torch.tensor(GROUPS)), f64(expected), rtol=1e-12, atol=1e-12)


def test_grpo_by_hand_one_of_four_is_right() -> None:
    # mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4, std 1/2.
    advantages = grpo(f64([1, 0, 0, 0]), torch.zeros(4, dtype=torch.int64), epsilon=0.0)
    assert advantages.tolist() == [1.5, -0.5, -0.5, -0.5]


def test_grpos_epsilon_is_added_to_the_std_and_not_to_the_variance() -> None:
    # std of (0, 2e-6) is sqrt(2)e-6: an epsilon of 1e-6 weighs as much as the std itself.
    advantages = grpo(f64([0.0, 2e-6]), torch.tensor([0, 0]))
    assert advantages[1].item() == pytest.approx(1e-6 / (math.sqrt(2) * 1e-6 + 1e-6), rel=1e-9)


def test_without_std_grpo_is_the_distance_from_the_groups_mean() -> None:
    expected = [reward - statistics.mean(members(group)) for reward, group in zip(REWARDS, GROUPS, strict=True)]
    torch.testing.assert_close(grpo(f64(REWARDS), torch.tensor(GROUPS), norm_by_std=False), f64(expected))


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e8 + 0.1])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_give_exactly_zero_in_float32(reward: float, size: int) -> None:
    rewards, groups = torch.full((size,), reward), torch.zeros(size, dtype=torch.int64)
    for advantages in (grpo(rewards, groups), grpo(rewards, groups, norm_by_std=False), rloo(rewards, groups)):
        assert advantages.tolist() == [0.0] * size


def test_a_group_of_one_keeps_its_reward() -> None:
    rewards, groups = f64([0.7, 1.0, 0.0]), torch.tensor([5, 1, 1])
    assert grpo(rewards, groups)[0].item() == 0.7
    assert grpo(rewards, groups, norm_by_std=False)[0].item() == 0.7
    assert rloo(rewards, groups)[0].item() == 0.7


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    expected = []
    for i, group in enumerate(GROUPS):
        others = [REWARDS[j] for j, g in enumerate(GROUPS) if g == group and j != i]
        expected.append(REWARDS[i] - statistics.mean(others))
    torch.testing.assert_close(rloo(f64(REWARDS), torch.tensor(GROUPS)), f64(expected))


def test_reinforce_has_no_baseline() -> None:
    assert reinforce(f64(REWARDS)).tolist() == REWARDS


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_stay_within_their_sequence(gamma: float) -> None:
    torch.manual_seed(0)
    lengths = [1, 5, 2, 13, 8]
    seq_ids = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    rewards = torch.randn(sum(lengths), dtype=torch.float64)
    expected, start = [], 0
    for length in lengths:
        own = rewards[start : start + length].tolist()
        expected += [sum(gamma ** (k - t) * own[k] for k in range(t, length)) for t in range(length)]
        start += length
    torch.testing.assert_close(discounted_returns(rewards, seq_ids, gamma), f64(expected))


def test_a_discount_over_a_long_sequence_does_not_underflow() -> None:
    tokens = 20_000
    returns = discounted_returns(torch.ones(tokens), torch.zeros(tokens, dtype=torch.int64), 0.9)
    torch.testing.assert_close(returns[:10_000], torch.full((10_000,), 10.0))


def test_whitening_uses_the_unbiased_variance_of_valid_tokens() -> None:
    values, mask = [3.0, 1.0, 99.0, 8.0], [1.0, 1.0, 0.0, 1.0]
    valid = [3.0, 1.0, 8.0]
    scale = math.sqrt(statistics.variance(valid) + 1e-8)
    expected = [(value - 4.0) / scale if keep else 0.0 for value, keep in zip(values, mask, strict=True)]
    torch.testing.assert_close(whiten(f64(values), f64(mask)), f64(expected), rtol=1e-12, atol=0.0)


def test_whitening_puts_its_epsilon_under_the_root() -> None:
    # Variance of (0, 2e-4) is 2e-8; with 1e-8 under the root the scale is sqrt(3e-8).
    whitened = whiten(f64([0.0, 2e-4]), torch.ones(2))
    assert whitened[1].item() == pytest.approx(1e-4 / math.sqrt(3e-8), rel=1e-9)


def test_whitening_one_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"at least 2 valid tokens in the batch, got 1\."):
        whiten(torch.ones(3), torch.tensor([0, 1, 0]))


def test_reinforce_plus_plus_whitens_the_reward_of_each_token_over_the_batch() -> None:
    # With gamma 1 and outcome rewards each token's return is its sequence's reward, so long sequences weigh more.
    inputs = batch([1.0, 0.0], [3, 1], [0, 1])
    returns = [1.0, 1.0, 1.0, 0.0]
    scale = math.sqrt(statistics.variance(returns) + 1e-8)
    expected = [(value - 0.75) / scale for value in returns]
    torch.testing.assert_close(ESTIMATORS["reinforcePlusPlus"](inputs), f64(expected))


def test_reinforce_plus_plus_discounts_from_the_end() -> None:
    inputs = batch([1.0, 0.0], [3, 1], [0, 1], gamma=0.5)
    returns = [0.25, 0.5, 1.0, 0.0]
    scale = math.sqrt(statistics.variance(returns) + 1e-8)
    expected = [(value - statistics.mean(returns)) / scale for value in returns]
    torch.testing.assert_close(ESTIMATORS["reinforcePlusPlus"](inputs), f64(expected))


def test_reinforce_plus_plus_baseline_subtracts_the_groups_mean_first() -> None:
    inputs = batch([1.0, 0.0, 5.0, 5.0], [2, 1, 1, 3], [0, 0, 1, 1])
    centered = [0.5, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    scale = math.sqrt(statistics.variance(centered) + 1e-8)
    expected = [(value - statistics.mean(centered)) / scale for value in centered]
    torch.testing.assert_close(ESTIMATORS["reinforcePlusPlusBaseline"](inputs), f64(expected))


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce"])
def test_group_estimators_give_each_valid_token_its_sequences_advantage(name: str) -> None:
    inputs = batch([1.0, 0.0, 3.0], [2, 3, 1], [0, 0, 0], mask=[1, 1, 1, 0, 1, 1])
    per_sequence = {
        "grpo": grpo(f64([1, 0, 3]), torch.zeros(3)),
        "rloo": rloo(f64([1, 0, 3]), torch.zeros(3)),
        "reinforce": f64([1, 0, 3]),
    }[name].tolist()
    a, b, c = per_sequence
    assert ESTIMATORS[name](inputs).tolist() == [a, a, b, 0.0, b, c]


def test_the_reward_of_a_sequence_is_the_sum_of_its_token_rewards_with_the_kl_penalty() -> None:
    inputs = AdvantageInputs(
        sequence_rewards=f64([1.0, 1.0]),
        token_rewards=f64([-0.1, 0.9, -0.3, 0.6]),
        mask=torch.ones(4),
        seq_ids=torch.tensor([0, 0, 1, 1]),
        group_ids=torch.tensor([0, 0]),
        norm_by_std=False,
    )
    torch.testing.assert_close(ESTIMATORS["grpo"](inputs), f64([0.25, 0.25, -0.25, -0.25]))


def test_a_masked_last_token_does_not_hide_its_sequences_reward() -> None:
    inputs = batch([1.0, 0.0], [2, 2], [0, 0], mask=[1, 0, 1, 1], norm_by_std=False)
    assert ESTIMATORS["grpo"](inputs).tolist() == [0.5, 0.0, -0.5, -0.5]


def test_outcome_rewards_sit_on_the_last_token() -> None:
    assert outcome_rewards(f64([2, 3]), torch.tensor([0, 0, 0, 1])).tolist() == [0, 0, 2, 3]


def test_a_sequence_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="Sequence 1 has no response token"):
        outcome_rewards(f64([2, 3, 4]), torch.tensor([0, 0, 2]))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0, 3.0], "returned list"),
        (torch.zeros(2), r"returned shape \(2,\).*shape \(3,\)"),
        (torch.zeros(3, dtype=torch.int64), "returned dtype torch.int64"),
        (torch.tensor([0.0, math.nan, 1.0]), r"returned nan at token 1 \(sequence 0\); 1 of 2"),
        (torch.tensor([-math.inf, 0.0, 1.0]), "returned -inf at token 0"),
    ],
)
def test_what_a_users_estimator_returned_wrongly_is_named(returned: object, message: str) -> None:
    inputs = batch([1.0, 0.0], [2, 1], [0, 0], mask=[1, 1, 0])
    with pytest.raises(DataError, match=f"'mine:advantage' {message}"):
        checked("mine:advantage", returned, inputs)


def test_a_checked_advantage_is_masked_and_has_no_gradient() -> None:
    inputs = batch([1.0, 0.0], [2, 1], [0, 0], mask=[1, 1, 0])
    advantages = torch.tensor([1.0, 2.0, math.nan], requires_grad=True)
    result = checked("mine:advantage", advantages, inputs)
    assert result.tolist() == [1.0, 2.0, 0.0]
    assert not result.requires_grad


def test_inputs_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(DataError, match=r"AdvantageInputs.mask: shape \(2,\) differs from seq_ids's \(3,\)"):
        batch([1.0, 0.0], [2, 1], [0, 0], mask=[1, 1])
