"""Policy losses: value against loops over Python numbers, gradient against the derivative worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from grpo_worker.algorithms import (
    POLICY_LOSSES,
    LossNormalizer,
    PolicyLossInputs,
    aggregate,
    aggregation_of,
)
from grpo_worker.errors import DataError, UsageError

LOW, HIGH, C = 0.2, 0.28, 3.0


def inputs(
    log_ratios: list[float], advantages: list[float], mask: list[int] | None = None, seq_ids: list[int] | None = None
) -> PolicyLossInputs:
    """Tokens whose l - l_old is given; l differs from token to token."""
    old = -torch.arange(1, len(log_ratios) + 1, dtype=torch.float64) / 3
    return PolicyLossInputs(
        log_probs=(old + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_(),
        old_log_probs=old,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        mask=torch.tensor(mask or [1] * len(log_ratios)),
        seq_ids=torch.tensor(seq_ids or [0] * len(log_ratios)),
        num_seqs=max(seq_ids or [0]) + 1,
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        clip_ratio_c=C,
    )


def gradient(loss: Tensor, batch: PolicyLossInputs) -> list[float]:
    return torch.autograd.grad(loss, batch.log_probs)[0].tolist()


def sums(batch: PolicyLossInputs, name: str) -> dict[str, float]:
    return {key: value.item() for key, value in POLICY_LOSSES[name](batch).metrics.items()}


# ratio, advantage -> loss, d loss / d l, by hand from the case distinction of PPO and of the dual clip.
VANILLA = [
    (1.0, 2.0, -2.0, -2.0),  # on policy: the gradient is -A
    (1.1, 2.0, -2.2, -2.2),  # within the range: -A r
    (1.5, 2.0, -2 * 1.28, 0.0),  # already more likely than 1 + high: no gradient
    (0.5, 2.0, -1.0, -1.0),  # a good token that became unlikely: not clipped
    (0.5, -2.0, 2 * 0.8, 0.0),  # a bad token already below 1 - low: no gradient
    (1.5, -2.0, 3.0, 3.0),  # a bad token that became likely: not clipped
    (5.0, -2.0, 6.0, 0.0),  # until the dual clip at c = 3
    (5.0, 2.0, -2 * 1.28, 0.0),  # the dual clip does not touch A > 0
    (0.001, 2.0, -0.002, -0.002),
    (7.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), VANILLA)
def test_vanilla_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    batch = inputs([math.log(ratio)], [advantage])
    output = POLICY_LOSSES["vanilla"](batch)
    assert output.loss.tolist() == pytest.approx([loss], abs=1e-12)
    assert gradient(output.loss.sum(), batch) == pytest.approx([slope], abs=1e-12)


def test_metrics_are_sums_over_valid_tokens() -> None:
    ratios = [ratio for ratio, *_ in VANILLA]
    batch = inputs([math.log(r) for r in ratios] * 2, [a for _, a, *_ in VANILLA] * 2, mask=[1] * 10 + [0] * 10)
    metrics = sums(batch, "vanilla")
    assert metrics["clip_ratio/high_mean"] == 2  # 1.5 and 5.0 with A > 0
    assert metrics["clip_ratio/low_mean"] == 1  # 0.5 with A < 0
    assert metrics["pg_clipfrac"] == 3
    assert metrics["pg_clipfrac_lower"] == 1  # 5.0 with A < 0
    assert metrics["ppo_kl"] == pytest.approx(-sum(math.log(r) for r in ratios))


def test_a_log_ratio_beyond_20_is_clamped_and_finite() -> None:
    batch = inputs([1000.0, -1000.0], [2.0, 2.0])
    output = POLICY_LOSSES["vanilla"](batch)
    assert output.loss.tolist() == pytest.approx([-2 * 1.28, -2 * math.exp(-20)], rel=1e-12)
    assert gradient(output.loss.sum(), batch) == [0.0, 0.0]
    assert output.metrics["ppo_kl"].item() == 0.0  # -20 + 20


def test_gspo_uses_the_geometric_mean_ratio_of_valid_tokens() -> None:
    batch = inputs([0.3, -0.1, 0.05, 9.0, -0.4], [1.0, 1.0, 1.0, 1.0, -1.0], [1, 1, 1, 0, 1], [0, 0, 0, 0, 1])
    first = math.exp((0.3 - 0.1 + 0.05) / 3)
    output = POLICY_LOSSES["gspo"](batch)
    # Sequence 0 is within the range; sequence 1 has s = e^-0.4 < 0.8 and A < 0: clipped.
    assert output.loss.tolist() == pytest.approx([-first, -first, -first, 0.0, 0.8])
    assert sums(batch, "gspo")["pg_clipfrac"] == 1
    assert sums(batch, "gspo")["ppo_kl"] == pytest.approx(-(0.3 - 0.1 + 0.05 - 0.4))


def test_gspos_gradient_is_that_of_the_sequence_objective() -> None:
    log_ratios, seq_ids, advantages = [0.1, -0.2, 0.15, 0.02, 0.05], [0, 0, 0, 1, 1], [1.5, 1.5, 1.5, -0.5, -0.5]
    batch = inputs(log_ratios, advantages, seq_ids=seq_ids)
    normalizer = LossNormalizer(aggregation_of("gspo", "token-mean"), 5, 2, 99)
    token_form = aggregate(POLICY_LOSSES["gspo"](batch).loss, batch.mask, batch.seq_ids, 2, normalizer)

    # The paper's objective, over sequences: J = 1/N sum_i A_i s_i with s_i = exp(mean_t (l - l_old)).
    s = [math.exp((0.1 - 0.2 + 0.15) / 3), math.exp((0.02 + 0.05) / 2)]
    assert token_form.item() == pytest.approx(-(1.5 * s[0] - 0.5 * s[1]) / 2)
    expected = [-1.5 * s[0] / 3 / 2] * 3 + [0.5 * s[1] / 2 / 2] * 2
    assert gradient(token_form, batch) == pytest.approx(expected)


def test_gspo_is_aggregated_by_sequence_whatever_the_job_says() -> None:
    assert aggregation_of("gspo", "token-mean") == "seq-mean-token-mean"
    assert aggregation_of("vanilla", "token-mean") == "token-mean"
    assert aggregation_of("cispo", "token-sum") == "token-sum"


def test_gspos_log_ratio_is_limited_to_10() -> None:
    batch = inputs([50.0, 50.0], [-1.0, -1.0])
    assert POLICY_LOSSES["gspo"](batch).loss.tolist() == pytest.approx([math.exp(10)] * 2)


@pytest.mark.parametrize(
    ("ratio", "weight"), [(1.0, 1.0), (1.1, 1.1), (4.0, 1 + HIGH), (0.1, 1 - LOW), (math.exp(25), 1 + HIGH)]
)
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_cispo_weighs_the_log_prob_by_the_clipped_ratio_and_keeps_the_gradient(
    ratio: float, weight: float, advantage: float
) -> None:
    batch = inputs([math.log(ratio)], [advantage])
    output = POLICY_LOSSES["cispo"](batch)
    assert output.loss.item() == pytest.approx(-weight * advantage * batch.log_probs.item())
    assert gradient(output.loss.sum(), batch) == pytest.approx([-weight * advantage])
    assert output.metrics["pg_clipfrac"].item() == (0 if 1 - LOW <= ratio <= 1 + HIGH else 1)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_the_gradient_of_every_loss_is_the_policy_gradient(name: str) -> None:
    batch = inputs([0.0] * 4, [0.5, -1.0, 2.0, -3.0])
    assert gradient(POLICY_LOSSES[name](batch).loss.sum(), batch) == pytest.approx([-0.5, 1.0, -2.0, 3.0])


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_masked_tokens_have_neither_loss_nor_gradient_nor_a_say(name: str) -> None:
    whole = inputs([0.1, -0.3, 0.2], [1.0, -1.0, 1.0], mask=[1, 0, 1], seq_ids=[0, 0, 1])
    poisoned = PolicyLossInputs(
        whole.log_probs, torch.tensor([whole.old_log_probs[0].item(), math.nan, whole.old_log_probs[2].item()]),
        whole.advantages, whole.mask, whole.seq_ids, 2, LOW, HIGH, C,
    )  # fmt: skip
    output = POLICY_LOSSES[name](poisoned)
    assert output.loss[1].item() == 0.0
    assert all(math.isfinite(value.item()) for value in output.metrics.values())
    assert gradient(output.loss.sum(), whole)[1] == 0.0


def test_a_dual_clip_below_one_is_refused() -> None:
    zero = torch.zeros(1)
    with pytest.raises(UsageError, match=r"greater than 1, got 1\.0"):
        PolicyLossInputs(zero, zero, zero, zero, torch.zeros(1, dtype=torch.int64), 1, clip_ratio_c=1.0)


def test_tensors_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match=r"advantages: shape \(3,\) differs from log_probs' \(2,\)"):
        PolicyLossInputs(torch.zeros(2), torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2), 1)
