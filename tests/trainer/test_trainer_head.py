"""The chunked LM head against log_softmax over everything."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_worker.trainer.logprobs import chunked_log_probs

TOKENS, WIDTH, VOCABULARY = 200, 16, 96


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 33, 200, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(chunk: int, temperature: float, with_entropy: bool) -> None:
    hidden, weight, targets = inputs(torch.float64)
    # float64 shows the formulas; the head itself computes in float32, which bounds the agreement.
    expected = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    expected_log_probs = expected.gather(-1, targets[:, None]).squeeze(-1)
    expected_entropy = -(expected.exp() * expected).sum(-1)
    upstream = torch.linspace(-1, 1, TOKENS, dtype=torch.float64)
    loss = (expected_log_probs * upstream).sum()
    if with_entropy:
        loss = loss + (expected_entropy * upstream.flip(0)).sum()
    expected_gradients = torch.autograd.grad(loss, [hidden, weight])

    hidden, weight, targets = inputs()
    log_probs, entropy = chunked_log_probs(hidden, weight, targets, temperature, chunk)
    loss = (log_probs * upstream.float()).sum()
    if with_entropy:
        loss = loss + (entropy * upstream.flip(0).float()).sum()
    gradients = torch.autograd.grad(loss, [hidden, weight])

    torch.testing.assert_close(log_probs.double(), expected_log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made() -> None:
    hidden, weight, targets = inputs()
    with LargestTensor() as seen:
        log_probs, entropy = chunked_log_probs(hidden, weight, targets, 1.0, chunk_tokens=20)
        (log_probs.sum() + entropy.sum()).backward()
    assert 0 < seen.elements <= max(20 * VOCABULARY, TOKENS * WIDTH)
    assert seen.elements < TOKENS * VOCABULARY


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    log_probs, entropy = chunked_log_probs(hidden, weight, torch.tensor([0, 0]))
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.tolist() == [0.0, -600.0]
    assert entropy.tolist() == [0.0, 0.0]
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
