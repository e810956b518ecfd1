"""Rollout correction against loops over Python numbers."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpo_worker.algorithms import CorrectionResult, Rejection, corrected, rollout_weights
from grpo_worker.config.algorithm import RolloutCorrection
from grpo_worker.errors import DataError, UsageError

# Three sequences of 3, 2 and 1 tokens; log-ratios d = old - rollout.
SEQ_IDS = [0, 0, 0, 1, 1, 2]
D = [0.1, -0.2, 1.5, -2.0, 0.3, 0.05]
OLD = [-1.0, -2.0, -0.5, -3.0, -0.7, -0.1]
SEQUENCES = [[0, 1, 2], [3, 4], [5]]


def correct(d: list[float] = D, mask: list[int] | None = None, **options: Any) -> CorrectionResult:
    old = torch.tensor(OLD, dtype=torch.float64)
    return rollout_weights(
        old,
        old - torch.tensor(d, dtype=torch.float64),
        torch.tensor(mask or [1] * 6),
        torch.tensor(SEQ_IDS),
        3,
        **options,
    )


def test_token_weights_are_truncated_from_above_only() -> None:
    result = correct(level="token", threshold=2.0)
    assert result.weights.tolist() == pytest.approx([min(math.exp(d), 2.0) for d in D])
    assert result.weights[2].item() == 2.0
    assert result.weights[3].item() == pytest.approx(math.exp(-2.0))
    assert result.mask.tolist() == [1] * 6


def test_icepop_zeroes_outside_its_range_and_keeps_the_token_in_the_denominators() -> None:
    result = correct(level="token", threshold=(0.5, 2.0))
    assert result.weights.tolist() == pytest.approx([math.exp(d) if 0.5 <= math.exp(d) <= 2.0 else 0.0 for d in D])
    assert result.weights.tolist().count(0.0) == 2
    assert result.mask.tolist() == [1] * 6


def test_sequence_weights_are_the_product_over_valid_tokens() -> None:
    result = correct(mask=[1, 0, 1, 1, 1, 1], level="sequence", threshold=2.0)
    products = [min(math.exp(0.1 + 1.5), 2.0), math.exp(-2.0 + 0.3), math.exp(0.05)]
    expected = [products[0], 0.0, products[0], products[1], products[1], products[2]]
    assert result.weights.tolist() == pytest.approx(expected)


def test_without_correction_every_valid_weight_is_one() -> None:
    assert correct(level="none", mask=[1, 1, 0, 1, 1, 1]).weights.tolist() == [1, 1, 0, 1, 1, 1]


def test_extreme_log_ratios_stay_finite() -> None:
    old, rollout = torch.tensor([-1.0, -901.0]), torch.tensor([-901.0, -1.0])
    result = rollout_weights(old, rollout, torch.ones(2), torch.tensor([0, 1]), 2, threshold=1e30)
    assert result.weights.tolist() == pytest.approx([math.exp(20), math.exp(-20)])
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalised_weights_average_to_one_over_their_own_unit(level: str) -> None:
    result = correct(level=level, threshold=2.0, batch_normalize=True)
    if level == "token":
        raw = [min(math.exp(d), 2.0) for d in D]
        units = result.weights.tolist()
    else:
        raw = [min(math.exp(sum(D[t] for t in sequence)), 2.0) for sequence in SEQUENCES]
        units = [result.weights[sequence[0]].item() for sequence in SEQUENCES]
    assert statistics.mean(units) == pytest.approx(1.0)
    assert result.metrics["rollout_corr/rollout_is_batch_norm_factor"] == pytest.approx(statistics.mean(raw))


def test_weights_have_no_gradient() -> None:
    old = torch.zeros(2, requires_grad=True)
    result = rollout_weights(old, torch.ones(2), torch.ones(2), torch.tensor([0, 1]), 2)
    assert not result.weights.requires_grad


def k(estimator: int, d: float) -> float:
    return {1: -d, 2: d * d / 2, 3: math.exp(d) - 1 - d}[estimator]


@pytest.mark.parametrize("estimator", [1, 2, 3])
@pytest.mark.parametrize("bound", [1.05, 1.25, 2.5])
def test_token_rejection_masks_tokens(estimator: int, bound: float) -> None:
    low, high = (-math.log(bound), math.log(bound)) if estimator == 1 else (-math.inf, bound)
    result = correct(rejections=[Rejection(f"token_k{estimator}", bound)])  # type: ignore[arg-type]
    assert result.mask.tolist() == [int(low <= k(estimator, d) <= high) for d in D]


@pytest.mark.parametrize(
    ("how", "estimator"), [(how, k) for how in ("sum", "mean", "max") for k in (1, 2, 3) if (how, k) != ("max", 1)]
)
@pytest.mark.parametrize("bound", [1.08, 1.6, 2.2])
def test_sequence_rejection_masks_whole_sequences(how: str, estimator: int, bound: float) -> None:
    reductions: dict[str, Callable[[list[float]], float]] = {"sum": sum, "mean": statistics.mean, "max": max}
    low, high = (-math.log(bound), math.log(bound)) if estimator == 1 else (-math.inf, bound)
    mask = [1, 1, 1, 1, 0, 1]  # the masked token of sequence 1 has no say
    expected = list(mask)
    for sequence in SEQUENCES:
        statistic = reductions[how]([k(estimator, D[t]) for t in sequence if mask[t]])
        if not low <= statistic <= high:
            for t in sequence:
                expected[t] = 0
    result = correct(mask=mask, rejections=[Rejection(f"seq_{how}_k{estimator}", bound)])  # type: ignore[arg-type]
    assert result.mask.tolist() == expected


def test_k1_bounds_are_ratios_of_rollout_to_trainer_and_may_be_lopsided() -> None:
    # exp(k1) = mu / old: 0.905, 1.221, 0.223, 7.389, 0.741, 0.951
    result = correct(rejections=[Rejection("token_k1", upper=8.0, lower=0.75)])
    assert result.mask.tolist() == [1, 1, 0, 1, 0, 1]


def test_all_criteria_must_pass_and_the_share_rejected_is_reported() -> None:
    result = correct(rejections=[Rejection("token_k2", 1.1), Rejection("seq_sum_k2", 1.9)])
    # token_k2 rejects tokens 2 (1.125) and 3 (2.0); seq_sum_k2 rejects sequence 1 (2.045): tokens 3 and 4.
    assert result.mask.tolist() == [1, 1, 0, 0, 0, 1]
    metrics = result.metrics
    assert metrics["rollout_corr/rollout_rs_token_k2_masked_fraction"] == pytest.approx(2 / 6)
    assert metrics["rollout_corr/rollout_rs_seq_sum_k2_masked_fraction"] == pytest.approx(2 / 6)
    assert metrics["rollout_corr/rollout_rs_seq_sum_k2_fraction_high"] == pytest.approx(1 / 3)
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(3 / 6)
    assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_the_new_mask_keeps_the_given_dtype(dtype: torch.dtype) -> None:
    old = torch.zeros(2)
    result = rollout_weights(
        old, torch.tensor([0.0, 5.0]), torch.ones(2, dtype=dtype), torch.tensor([0, 1]), 2,
        rejections=[Rejection("token_k3", 0.1)],
    )  # fmt: skip
    assert result.mask.dtype == dtype
    assert result.mask.tolist() == [1, 0]


def test_mismatch_metrics_by_their_definitions() -> None:
    metrics = correct(level="token", threshold=2.0).metrics
    rollout = [old - d for old, d in zip(OLD, D, strict=True)]
    log_ppl = {
        name: [-statistics.mean(values[t] for t in sequence) for sequence in SEQUENCES]
        for name, values in (("old", OLD), ("rollout", rollout))
    }
    differences = [a - b for a, b in zip(log_ppl["old"], log_ppl["rollout"], strict=True)]
    probabilities = [math.exp(value) for value in OLD], [math.exp(value) for value in rollout]
    gaps = [abs(a - b) for a, b in zip(*probabilities, strict=True)]
    used = [min(math.exp(d), 2.0) for d in D]
    expected = {
        "rollout_corr/kl": -statistics.mean(D),
        "rollout_corr/k3_kl": statistics.mean(math.exp(d) - d - 1 for d in D),
        "rollout_corr/training_ppl": statistics.mean(map(math.exp, log_ppl["old"])),
        "rollout_corr/rollout_ppl": statistics.mean(map(math.exp, log_ppl["rollout"])),
        "rollout_corr/training_log_ppl": statistics.mean(log_ppl["old"]),
        "rollout_corr/rollout_log_ppl": statistics.mean(log_ppl["rollout"]),
        "rollout_corr/log_ppl_diff": statistics.mean(differences),
        "rollout_corr/log_ppl_abs_diff": statistics.mean(map(abs, differences)),
        "rollout_corr/log_ppl_diff_max": max(differences),
        "rollout_corr/log_ppl_diff_min": min(differences),
        "rollout_corr/ppl_ratio": statistics.mean(map(math.exp, differences)),
        "rollout_corr/chi2_token": statistics.mean(math.exp(d) ** 2 for d in D) - 1,
        "rollout_corr/chi2_seq": statistics.mean(math.exp(sum(D[t] for t in s)) ** 2 for s in SEQUENCES) - 1,
        "rollout_corr/rollout_is_mean": statistics.mean(map(math.exp, D)),
        "rollout_corr/rollout_is_max": math.exp(1.5),
        "rollout_corr/rollout_is_min": math.exp(-2.0),
        "rollout_corr/rollout_is_ratio_fraction_high": 1 / 6,
        "rollout_corr/rollout_is_ratio_fraction_low": 1 / 6,
        "rollout_corr/rollout_is_std": statistics.pstdev(used),
        "rollout_corr/rollout_is_eff_sample_size": statistics.mean(used) ** 2
        / statistics.mean(weight**2 for weight in used),
        "training/rollout_probs_diff_mean": statistics.mean(gaps),
        "training/rollout_probs_diff_max": max(gaps),
        "training/rollout_probs_diff_std": statistics.stdev(gaps),
        "training/rollout_actor_probs_pearson_corr": statistics.correlation(*probabilities),
        "training/rollout_logprobs_abs_diff_mean": statistics.mean(map(abs, D)),
        "training/rollout_logprobs_abs_diff_max": 2.0,
    }
    assert metrics == pytest.approx(expected)


def test_masked_tokens_have_no_say_in_weights_or_metrics() -> None:
    mask = [1, 1, 0, 1, 1, 0]
    clean = correct([*D[:2], 0.0, *D[3:5], 0.0], mask=mask)
    poisoned = correct([*D[:2], math.nan, *D[3:5], math.inf], mask=mask)
    assert poisoned.metrics == clean.metrics
    assert poisoned.weights.tolist() == clean.weights.tolist()


def test_a_batch_without_valid_tokens_has_no_metrics() -> None:
    result = correct(mask=[0] * 6)
    assert result.metrics == {}
    assert result.weights.tolist() == [0.0] * 6


def test_log_probs_of_the_same_tempered_distribution_need_no_correction() -> None:
    """Temperature is the trainer's: it divides its logits by it; here it must not be seen."""
    torch.manual_seed(0)
    temperature, logits = 0.7, torch.randn(6, 9, dtype=torch.float64)
    tokens = torch.randint(9, (6, 1))
    rollout = (logits / temperature).log_softmax(-1).gather(1, tokens).squeeze(1)
    raw = logits.log_softmax(-1).gather(1, tokens).squeeze(1)
    mask, seq_ids = torch.ones(6), torch.tensor(SEQ_IDS)
    assert rollout_weights(rollout.clone(), rollout, mask, seq_ids, 3).weights.tolist() == [1.0] * 6
    assert rollout_weights(raw, rollout, mask, seq_ids, 3).metrics["rollout_corr/k3_kl"] > 0.01


@pytest.mark.parametrize("threshold", [0.0, -1.0, (2.0, 0.5), (1.0, 1.0), (-1.0, 2.0)])
def test_a_threshold_that_bounds_nothing_is_refused(threshold: Any) -> None:
    with pytest.raises(UsageError, match="C > 0 or 0 <= low < high"):
        correct(threshold=threshold)


@pytest.mark.parametrize(
    ("kind", "upper", "lower"),
    [("token_k1", 0.9, None), ("token_k1", 1.2, 1.5), ("token_k2", -1.0, None), ("seq_mean_k3", 1.0, 0.5)],
)
def test_rejection_bounds_that_contradict_are_refused(kind: Any, upper: float, lower: float | None) -> None:
    with pytest.raises(UsageError, match=f"Rejection '{kind}'"):
        Rejection(kind, upper, lower)


def test_an_unknown_rejection_names_the_choices() -> None:
    with pytest.raises(UsageError, match=r"Unknown rejection 'seq_max_k1'\. Choose from: token_k1"):
        Rejection("seq_max_k1", 2.0)  # type: ignore[arg-type]


def test_tensors_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match=r"rollout_log_probs has shape \(3,\), old_log_probs \(2,\)"):
        rollout_weights(torch.zeros(2), torch.zeros(3), torch.ones(2), torch.zeros(2), 1)


def test_where_nothing_reads_the_engines_log_probs_some_may_be_missing() -> None:
    """Weights and mask are as if all were there; the metrics are those of the sequences that have them."""
    old, seq_ids = torch.tensor(OLD, dtype=torch.float64), torch.tensor(SEQ_IDS)
    rollout = old - torch.tensor(D, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 1, 1])
    options = RolloutCorrection.model_validate({"rolloutIs": "none"})
    missing = torch.where(seq_ids == 1, torch.nan, rollout)
    found = corrected(old, missing, mask, seq_ids, 3, options)
    assert found.weights.tolist() == found.mask.tolist() == [1, 0, 1, 1, 1, 1]
    expected = corrected(old, rollout, mask * (seq_ids != 1), seq_ids, 3, options).metrics
    assert found.metrics == pytest.approx(expected | {"training/rollout_log_probs_sequences": 2.0})
    assert math.isfinite(sum(found.metrics.values()))
    none = corrected(old, torch.full_like(old, torch.nan), mask, seq_ids, 3, options)
    assert none.weights.tolist() == [1, 0, 1, 1, 1, 1]
    assert none.metrics == {"training/rollout_log_probs_sequences": 0.0}
    whole = corrected(old, rollout, mask, seq_ids, 3, options)
    assert "training/rollout_log_probs_sequences" not in whole.metrics
