"""Packing: each sequence once, budgets kept, ranks level."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_worker.trainer.packing import PackingPlan, cost, packing_efficiency, plan_micro_batches, rank_imbalance

lengths_strategy = st.lists(st.integers(2, 3000), min_size=1, max_size=80)


def members(plan: PackingPlan) -> list[int]:
    return sorted(i for rank in plan.ranks for micro in rank for i in micro)


@settings(max_examples=150, deadline=None)
@given(lengths_strategy, st.integers(1, 8), st.integers(64, 4096))
def test_a_token_budget_holds_every_sequence_once_and_whole(lengths: list[int], ranks: int, budget: int) -> None:
    plan = plan_micro_batches(lengths, ranks, max_tokens=budget)
    assert members(plan) == list(range(len(lengths)))
    assert len(plan.ranks) == ranks
    assert len({len(rank) for rank in plan.ranks}) == 1
    for rank in plan.ranks:
        for micro in rank:
            assert len(micro) <= 1 or sum(lengths[i] for i in micro) <= budget


@settings(max_examples=150, deadline=None)
@given(lengths_strategy, st.integers(1, 8), st.integers(1, 9))
def test_a_fixed_size_holds_every_sequence_once_in_the_fewest_rounds(lengths: list[int], ranks: int, size: int) -> None:
    plan = plan_micro_batches(lengths, ranks, sequences_per_micro_batch=size)
    assert members(plan) == list(range(len(lengths)))
    assert all(len(micro) <= size for rank in plan.ranks for micro in rank)
    per_rank = -(-len(lengths) // ranks)
    assert plan.micro_batches == -(-per_rank // size)
    counts = [sum(map(len, rank)) for rank in plan.ranks]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=100, deadline=None)
@given(lengths_strategy, st.integers(1, 8), st.integers(64, 4096))
def test_rounds_are_no_more_than_the_packing_needs(lengths: list[int], ranks: int, budget: int) -> None:
    plan = plan_micro_batches(lengths, ranks, max_tokens=budget)
    filled = sum(1 for rank in plan.ranks for micro in rank if micro)
    one_rank = plan_micro_batches(lengths, 1, max_tokens=budget).micro_batches
    assert plan.micro_batches == -(-one_rank // ranks)
    assert filled >= one_rank


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(64, 1024), min_size=64, max_size=128), st.integers(2, 8))
def test_the_busiest_rank_is_near_the_mean(lengths: list[int], ranks: int) -> None:
    fixed = plan_micro_batches(lengths, ranks, sequences_per_micro_batch=4)
    largest = max(map(cost, lengths)) * ranks / sum(map(cost, lengths))
    assert rank_imbalance(fixed, lengths) <= 1 + 2 * largest


def test_the_same_lengths_give_the_same_plan() -> None:
    lengths = [7, 300, 300, 12, 90, 90, 90, 41]
    assert plan_micro_batches(lengths, 3, max_tokens=320) == plan_micro_batches(lengths, 3, max_tokens=320)


def test_a_remainder_is_shared_out() -> None:
    plan = plan_micro_batches([520] * 64, ranks=1, max_tokens=16384)  # 31, 31 and 2 would fit as well
    assert sorted(map(len, plan.ranks[0])) == [21, 21, 22]
    tail = plan_micro_batches([4000, 3000] + [100] * 50, ranks=1, max_tokens=8192)
    assert sorted(sum([4000, 3000, *[100] * 50][i] for i in members) for members in tail.ranks[0])[0] > 5000


def test_a_sequence_over_the_budget_is_alone() -> None:
    plan = plan_micro_batches([500, 10, 20], 1, max_tokens=100)
    assert plan.ranks == [[[0], [1, 2]]]


def test_fewer_sequences_than_ranks_leave_empty_micro_batches() -> None:
    plan = plan_micro_batches([5, 9], 4, max_tokens=100)
    assert sorted(plan.ranks) == [[[]], [[]], [[0]], [[1]]]


def test_long_tailed_responses_fill_nine_tenths_of_the_slots() -> None:
    lengths = [64 + (i * 7919) % 960 for i in range(512)]
    plan = plan_micro_batches(lengths, 1, max_tokens=8192)
    assert packing_efficiency(plan, lengths, 8192) > 0.95


def test_neither_or_both_limits_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="not both"):
        plan_micro_batches([1], 1)
