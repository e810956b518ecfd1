"""Loss aggregation: closed forms, and invariance of value and gradient under any split of the mini-batch."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_worker.algorithms import (
    POLICY_LOSSES,
    LossNormalizer,
    PolicyLossInputs,
    aggregate,
    total_loss,
)
from grpo_worker.config.actor import LossAggMode
from grpo_worker.errors import DataError, UsageError

MODES: tuple[LossAggMode, ...] = get_args(LossAggMode)
MAX_RESPONSE_TOKENS = 16

# Three sequences of 3, 1 and 2 tokens; the last is fully masked, and so is one token of the first.
LOSS = [1.0, 2.0, 30.0, 4.0, 50.0, 60.0]
MASK = [1, 1, 0, 1, 0, 0]
SEQ_IDS = [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", (1 + 2 + 4) / 3),
        ("token-sum", 1 + 2 + 4),
        ("seq-mean-token-sum", (3 + 4) / 2),
        ("seq-mean-token-sum-norm", (3 / 16 + 4 / 16) / 2),
        ("seq-mean-token-mean", (1.5 + 4) / 2),
    ],
)
def test_each_mode_by_hand_with_a_fully_masked_sequence(mode: LossAggMode, expected: float) -> None:
    mask, seq_ids = torch.tensor(MASK), torch.tensor(SEQ_IDS)
    normalizer = LossNormalizer(mode, 3, 2, MAX_RESPONSE_TOKENS)
    assert aggregate(torch.tensor(LOSS), mask, seq_ids, 3, normalizer).item() == pytest.approx(expected)


def test_the_norm_is_the_constant_and_not_the_longest_response_at_hand() -> None:
    losses = []
    for padding in (0, 7):  # masked tokens, as a longer neighbour would bring
        mask = torch.tensor([1, 1] + [0] * padding)
        seq_ids = torch.zeros(2 + padding, dtype=torch.int64)
        normalizer = LossNormalizer("seq-mean-token-sum-norm", 2, 1, max_response_tokens=1000)
        losses.append(aggregate(torch.ones(2 + padding), mask, seq_ids, 1, normalizer).item())
    assert losses == pytest.approx([2 / 1000, 2 / 1000])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_with_nothing_left_has_loss_zero(mode: LossAggMode) -> None:
    loss, none = torch.ones(2, requires_grad=True), torch.zeros(2)
    value = aggregate(loss, none, torch.tensor([0, 1]), 2, LossNormalizer(mode, 0, 0, 8))
    value.backward()
    assert value.item() == 0.0
    assert loss.grad is not None and loss.grad.tolist() == [0.0, 0.0]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="Unknown loss aggregation 'mean'"):
        aggregate(torch.ones(1), torch.ones(1), torch.zeros(1), 1, LossNormalizer("mean", 1, 1, 1))  # type: ignore[arg-type]


def test_a_users_loss_that_was_averaged_already_is_refused() -> None:
    with pytest.raises(DataError, match="must return one value per token"):
        aggregate(torch.ones(()), torch.ones(3), torch.zeros(3), 1, LossNormalizer("token-mean", 3, 1, 8))


class MiniBatch:
    """Random ragged data: log-probs, advantages, importance weights and entropy per token."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_seqs, tokens = len(lengths), sum(lengths)
        self.seq_ids = torch.repeat_interleave(torch.arange(self.num_seqs), torch.tensor(lengths))

        def normal() -> Tensor:
            return torch.randn(tokens, generator=generator, dtype=torch.float64)

        self.log_probs, self.old, self.ref = normal() - 3, normal() - 3, normal() - 3
        self.advantages, self.weights, self.entropy = normal(), normal().exp(), normal().abs()
        self.mask = torch.rand(tokens, generator=generator) < 0.7

    def share(self, logits: Tensor, seqs: list[int], name: str, normalizer: LossNormalizer) -> Tensor:
        """The loss of some of the sequences, renumbered from 0 as a micro-batch is."""
        at = torch.cat([(self.seq_ids == seq).nonzero().flatten() for seq in seqs])
        renumber = {seq: i for i, seq in enumerate(seqs)}
        ids = torch.tensor([renumber[int(seq)] for seq in self.seq_ids[at]], dtype=torch.int64)
        log_probs = self.log_probs[at] + logits[at]
        inputs = PolicyLossInputs(log_probs, self.old[at], self.advantages[at], self.mask[at], ids, len(seqs))
        loss = POLICY_LOSSES[name](inputs).loss
        return total_loss(
            loss, self.mask[at], ids, len(seqs), normalizer, is_weights=self.weights[at],
            kl=0.5 * (log_probs - self.ref[at]).square(), kl_coef=0.1,
            entropy=self.entropy[at] * log_probs.cos(), entropy_coef=0.01,
        ).total  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    seed=st.integers(0, 10_000),
    mode=st.sampled_from(MODES),
    name=st.sampled_from(sorted(POLICY_LOSSES)),
    data=st.data(),
)
def test_any_split_into_micro_batches_and_ranks_has_the_value_and_gradient_of_the_whole(
    lengths: list[int], seed: int, mode: LossAggMode, name: str, data: st.DataObject
) -> None:
    batch = MiniBatch(lengths, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    owner = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    parts = [part for k in range(4) if (part := [seq for seq in order if owner[seq] == k])]
    counts = int(batch.mask.sum()), len(set(batch.seq_ids[batch.mask.bool()].tolist()))
    normalizer = LossNormalizer(mode, *counts, MAX_RESPONSE_TOKENS)

    def value_and_gradient(split: list[list[int]]) -> tuple[float, Tensor]:
        logits = torch.zeros(sum(lengths), dtype=torch.float64, requires_grad=True)
        total = 0.0
        for seqs in split:  # one backward each: accumulation
            share = batch.share(logits, seqs, name, normalizer)
            share.backward()
            total += share.item()
        assert logits.grad is not None
        return total, logits.grad

    whole_value, whole_gradient = value_and_gradient([list(range(len(lengths)))])
    split_value, split_gradient = value_and_gradient(parts)
    assert split_value == pytest.approx(whole_value, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(split_gradient, whole_gradient, rtol=1e-10, atol=1e-12)


def test_importance_weights_touch_the_policy_term_alone() -> None:
    mask, seq_ids = torch.ones(2), torch.tensor([0, 1])
    loss = total_loss(
        torch.tensor([1.0, 3.0]), mask, seq_ids, 2, LossNormalizer("token-mean", 2, 2, 4),
        is_weights=torch.tensor([2.0, 0.0]),
        kl=torch.tensor([10.0, 20.0]), kl_coef=0.1,
        entropy=torch.tensor([4.0, 6.0]), entropy_coef=0.5,
    )  # fmt: skip
    assert loss.policy.item() == pytest.approx(1.0)
    assert loss.kl.item() == pytest.approx(15.0)
    assert loss.entropy.item() == pytest.approx(5.0)
    assert loss.total.item() == pytest.approx(1.0 + 0.1 * 15 - 0.5 * 5)


def test_importance_weights_carry_no_gradient() -> None:
    weights = torch.ones(2, requires_grad=True)
    losses = torch.ones(2, requires_grad=True)
    total_loss(
        losses, torch.ones(2), torch.tensor([0, 1]), 2, LossNormalizer("token-sum", 2, 2, 4), is_weights=weights
    ).total.backward()
    assert weights.grad is None


def test_the_policy_term_may_have_a_mode_of_its_own() -> None:
    mask, seq_ids = torch.ones(4), torch.tensor([0, 0, 0, 1])
    values = torch.tensor([1.0, 1.0, 1.0, 5.0])
    loss = total_loss(
        values, mask, seq_ids, 2, LossNormalizer("token-mean", 4, 2, 4), policy_mode="seq-mean-token-mean", kl=values
    )
    assert loss.policy.item() == pytest.approx(3.0)
    assert loss.kl.item() == pytest.approx(2.0)


def test_entropy_that_is_only_observed_stays_out_of_the_backward_pass() -> None:
    losses, entropy = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    result = total_loss(
        losses, torch.ones(1), torch.zeros(1, dtype=torch.int64), 1, LossNormalizer("token-mean", 1, 1, 4),
        entropy=entropy,
    )  # fmt: skip
    result.total.backward()
    assert entropy.grad is None
    assert result.entropy.item() == 1.0
