"""Which rank computes which sequences, in which micro-batches.

Invariant: every sequence is in exactly one micro-batch, whole; no micro-batch of two or more sequences is over the
token budget; all ranks have the same number of micro-batches (FSDP's collectives need it); the plan is a pure
function of the lengths, so each rank derives the same one from the same message.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

# Length at which causal attention costs as much as all matrix products, where a model's own is not known (`mfu.ModelFlops`): 6 x hidden
# size, which is a dense layer's, here for 1024.
ATTENTION_PARITY_TOKENS = 6144.0


@dataclass(frozen=True)
class PackingPlan:
    """`ranks[r][m]` are the indices of the sequences of micro-batch `m` on rank `r`; an empty list is padding."""

    ranks: list[list[list[int]]]

    @property
    def micro_batches(self) -> int:
        return len(self.ranks[0])


def cost(tokens: int, parity_tokens: float = ATTENTION_PARITY_TOKENS) -> float:
    """Work of one sequence: linear in its tokens, plus causal attention's quadratic part, equal at `parity_tokens`."""
    return tokens * (1.0 + tokens / parity_tokens)


def plan_micro_batches(
    lengths: Sequence[int],
    ranks: int,
    max_tokens: int | None = None,
    sequences_per_micro_batch: int | None = None,
    parity_tokens: float = ATTENTION_PARITY_TOKENS,
) -> PackingPlan:
    """Pack `lengths` [sequences] either under a token budget or `sequences_per_micro_batch` at a time.

    A sequence that is longer than the budget by itself gets a micro-batch of its own.
    """
    if (max_tokens is None) == (sequences_per_micro_batch is None):
        raise ValueError("give max_tokens or sequences_per_micro_batch, not both")
    costs = [cost(length, parity_tokens) for length in lengths]
    if sequences_per_micro_batch is not None:
        shares = _balance_costs(costs, ranks, len(costs) // ranks, -(-len(costs) // ranks))
        plans = [_fixed_size(share, sequences_per_micro_batch) for share in shares]
    else:
        assert max_tokens is not None
        bins = _best_fit_decreasing(lengths, max_tokens)
        bins = _level(_grow(bins, costs, ranks), lengths, costs, max_tokens)
        weights = [sum(costs[i] for i in members) for members in bins]
        rounds = -(-len(bins) // ranks)  # all ranks wait for the one with the most
        plans = [[bins[b] for b in share] for share in _balance_costs(weights, ranks, most=rounds)]
    width = max(len(plan) for plan in plans)
    for plan in plans:
        for members in plan:
            members.sort()
        # Longest first: the step's peak of memory comes at once, not after minutes.
        # Ranks wait for one another in each round, so the rounds must pair micro-batches of equal cost.
        plan.sort(key=lambda members: (-sum(costs[i] for i in members), members))
        plan.extend([] for _ in range(width - len(plan)))
    return PackingPlan(plans)


def packing_efficiency(plan: PackingPlan, lengths: Sequence[int], max_tokens: int) -> float:
    """Real tokens over the token slots of all micro-batches, (0, 1]; an oversized micro-batch counts its own length."""
    slots = tokens = 0
    for micro_batches in plan.ranks:
        for members in micro_batches:
            size = sum(lengths[i] for i in members)
            tokens += size
            slots += max(size, max_tokens)
    return tokens / slots if slots else 1.0


def rank_imbalance(plan: PackingPlan, lengths: Sequence[int], parity_tokens: float = ATTENTION_PARITY_TOKENS) -> float:
    """Cost of the busiest rank over the mean, 1.0 is perfect."""
    loads = [sum(cost(lengths[i], parity_tokens) for members in rank for i in members) for rank in plan.ranks]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def _best_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Longest first, each into the fullest bin that still holds it (at most 11/9 of the optimum's bins, plus one)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda b: (room[b], b))
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(max_tokens - lengths[index])
    return bins


def _grow(bins: list[list[int]], costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Split the costliest bins until there are as many as a multiple of `ranks` wants, so that no rank computes
    padding.

    The number of rounds stays the same, so splitting is free; a bin of one sequence cannot be split.
    """
    wanted = -(-len(bins) // ranks) * ranks
    bins = [list(members) for members in bins]
    while len(bins) < wanted:
        splittable = [b for b in range(len(bins)) if len(bins[b]) > 1]
        if not splittable:
            break
        source = max(splittable, key=lambda b: (sum(costs[i] for i in bins[b]), -b))
        halves = _balance_costs([costs[i] for i in bins[source]], 2)
        members = bins[source]
        bins[source] = [members[i] for i in halves[0]]
        bins.append([members[i] for i in halves[1]])
    return bins


def _level(bins: list[list[int]], lengths: Sequence[int], costs: Sequence[float], max_tokens: int) -> list[list[int]]:
    """As many bins of as equal a cost as can be, where these keep the budget: a small one among large ones leaves a device idle, ranks
    waiting, and has compiled code compiled again for its size.
    """
    level = _balance_costs(costs, len(bins))
    fits = all(len(members) == 1 or sum(lengths[i] for i in members) <= max_tokens for members in level)
    return level if fits else bins


def _balance_costs(costs: Sequence[float], parts: int, fewest: int = 0, most: int | None = None) -> list[list[int]]:
    """Longest-processing-time-first: each item to the least loaded part, at most 4/3 of the best makespan (Graham,
    1969).

    Each part gets `fewest` items or one more when that is given, and `most` at most.
    """
    heap = [(0.0, part) for part in range(parts)]
    result: list[list[int]] = [[] for _ in range(parts)]
    extra = len(costs) - fewest * parts  # parts that may hold one more than `fewest`
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        while True:
            load, part = heapq.heappop(heap)
            full = most is not None and len(result[part]) >= most
            if fewest and not full and len(result[part]) == fewest:
                full = extra <= 0
                extra -= 0 if full else 1
            if not full:
                break
        result[part].append(index)
        heapq.heappush(heap, (load + costs[index], part))
    for members in result:
        members.sort()
    return result


def _fixed_size(members: list[int], size: int) -> list[list[int]]:
    return [members[start : start + size] for start in range(0, len(members), size)]
