"""KL estimators and the KL coefficient."""

import math

import pytest
import torch

from grpo_worker.algorithms import kl_penalty, make_kl_controller, penalize_rewards
from grpo_worker.config.algorithm import KLKind
from grpo_worker.errors import UsageError

LOG_PROBS = [-1.0, -0.2, -3.0, -0.5]
REF_LOG_PROBS = [-1.5, -0.1, -1.0, -0.5]


def closed_form(kind: str, log_prob: float, ref_log_prob: float) -> float:
    d = log_prob - ref_log_prob
    return {
        "k1": d,
        "abs": abs(d),
        "k2": d * d / 2,
        "k3": math.exp(ref_log_prob) / math.exp(log_prob) - 1 - math.log(math.exp(ref_log_prob) / math.exp(log_prob)),
    }[kind]


def closed_form_gradient(kind: str, log_prob: float, ref_log_prob: float) -> float:
    d = log_prob - ref_log_prob
    return {"k1": 1.0, "abs": math.copysign(1, d) if d else 0.0, "k2": d, "k3": 1 - math.exp(-d)}[kind]


@pytest.mark.parametrize(
    ("kind", "formula"),
    [("k1", "k1"), ("kl", "k1"), ("abs", "abs"), ("k2", "k2"), ("mse", "k2"), ("k3", "k3"), ("low_var_kl", "k3")],
)
@pytest.mark.parametrize("suffix", ["", "+"])
def test_value_and_gradient_of_each_estimator(kind: str, formula: str, suffix: str) -> None:
    log_probs = torch.tensor(LOG_PROBS, dtype=torch.float64, requires_grad=True)
    value = kl_penalty(log_probs, torch.tensor(REF_LOG_PROBS, dtype=torch.float64), kind + suffix)  # type: ignore[arg-type]
    value.sum().backward()
    pairs = list(zip(LOG_PROBS, REF_LOG_PROBS, strict=True))
    assert value.tolist() == pytest.approx([closed_form(formula, *pair) for pair in pairs], abs=1e-12)
    assert log_probs.grad is not None
    of = "k2" if suffix else formula  # `+` takes the gradient of k2, whatever the value
    assert log_probs.grad.tolist() == pytest.approx([closed_form_gradient(of, *pair) for pair in pairs], abs=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_under_the_policy(kind: KLKind) -> None:
    torch.manual_seed(0)
    # Logits small enough for no token to reach k3's limits, which would bias it.
    policy, reference = (torch.randn(2, 11, dtype=torch.float64) / 2).log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_penalty(policy, reference, kind)).sum(), divergence)


def test_k2_has_the_unbiased_gradient_and_k3_has_not() -> None:
    torch.manual_seed(0)
    logits = torch.randn(11, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(11, dtype=torch.float64).log_softmax(-1)

    def expected_gradient(kind: KLKind) -> torch.Tensor:
        log_probs = logits.log_softmax(-1)
        expectation = (log_probs.exp().detach() * kl_penalty(log_probs, reference, kind)).sum()
        return torch.autograd.grad(expectation, logits)[0]

    log_probs = logits.log_softmax(-1)
    exact = torch.autograd.grad((log_probs.exp() * (log_probs - reference)).sum(), logits)[0]
    torch.testing.assert_close(expected_gradient("k2"), exact)
    torch.testing.assert_close(expected_gradient("k3+"), exact)
    assert not torch.allclose(expected_gradient("k3"), exact, atol=1e-3)


@pytest.mark.parametrize(
    ("log_prob", "value"),
    [
        (-2.0, math.exp(2.0) - 3.0),  # below both limits
        (-3.0, 10.0),  # e^3 - 4 = 16.1 is cut to 10
        (-1000.0, 10.0),  # e^1000 would be inf without the limit of the exponent
        (15.0, math.exp(-15.0) + 14.0),
        (1000.0, 10.0),
    ],
)
def test_k3_is_limited(log_prob: float, value: float) -> None:
    tensor = torch.tensor([log_prob], dtype=torch.float64, requires_grad=True)
    result = kl_penalty(tensor, torch.zeros(1, dtype=torch.float64), "k3")
    assert result.item() == pytest.approx(min(value, 10.0))
    result.backward()
    assert tensor.grad is not None
    assert math.isfinite(tensor.grad.item())
    assert (tensor.grad.item() == 0) == (value >= 10)


def test_k3_of_nearly_equal_policies_keeps_its_digits_in_float32() -> None:
    result = kl_penalty(torch.tensor([1e-4]), torch.zeros(1), "k3")
    assert result.item() == pytest.approx(5e-9, rel=0.01)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(UsageError, match=r"Unknown KL estimator 'full'\. Choose one of: k1, kl"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "full")  # type: ignore[arg-type]


def test_a_penalty_in_the_reward_skips_masked_tokens_and_averages_by_sequence() -> None:
    rewards, batch_kl = penalize_rewards(
        torch.tensor([0.0, 1.0, 2.0, 0.0]),
        kl=torch.tensor([0.2, 0.4, 1.0, math.nan]),
        mask=torch.tensor([1, 1, 1, 0]),
        seq_ids=torch.tensor([0, 0, 1, 2]),
        num_seqs=3,
        coefficient=0.5,
    )
    assert rewards.tolist() == pytest.approx([-0.1, 0.8, 1.5, 0.0])
    assert batch_kl == pytest.approx((0.3 + 1.0) / 2)


@pytest.mark.parametrize(
    ("current_kl", "factor"),
    [(0.1, 1.0), (0.11, 1 + 0.1 * 0.05), (5.0, 1 + 0.2 * 0.05), (0.0, 1 - 0.2 * 0.05)],
)
def test_the_adaptive_coefficient_moves_towards_its_target_by_at_most_a_fifth(current_kl: float, factor: float) -> None:
    controller = make_kl_controller("adaptive", 0.2, horizon=1000, target_kl=0.1)
    controller.update(current_kl, num_seqs=50)
    assert controller.coefficient == pytest.approx(0.2 * factor)


def test_a_resumed_adaptive_controller_goes_on_where_it_was() -> None:
    first = make_kl_controller("adaptive", 0.2, horizon=100, target_kl=0.1)
    first.update(1.0, num_seqs=64)
    second = make_kl_controller("adaptive", 0.2, horizon=100, target_kl=0.1)
    second.load_state_dict(first.state_dict())
    assert second.coefficient == first.coefficient != 0.2


def test_a_fixed_coefficient_is_the_documents_also_after_a_resume() -> None:
    controller = make_kl_controller("fixed", 0.001)
    controller.update(100.0, num_seqs=64)
    controller.load_state_dict(make_kl_controller("adaptive", 0.5).state_dict())
    assert controller.coefficient == 0.001


@pytest.mark.parametrize(("horizon", "target_kl"), [(0, 0.1), (100, 0)])
def test_an_adaptive_controller_without_a_target_is_refused(horizon: float, target_kl: float) -> None:
    with pytest.raises(UsageError, match="horizon > 0 and target_kl > 0"):
        make_kl_controller("adaptive", 0.1, horizon=horizon, target_kl=target_kl)
