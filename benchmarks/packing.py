"""Our packer beside padded fixed micro-batches and beside sequential packing, on three distributions of lengths.

Invariant: all three see the same lengths in the same order under the same memory limit, which is the token budget of a
micro-batch, and all are charged by the same cost model (`packing.cost`: linear plus causal attention's quadratic part).

- `packed`: `plan_micro_batches`, best fit decreasing over the whole step, bins balanced over ranks by cost.
- `padded`: fixed micro-batches padded to the longest sequence in them, as Hugging Face's Trainer and TRL's GRPOTrainer
  form them. The number of sequences is what the budget allows at the longest length: the user has to choose it ahead.
- `sequential`: sequences in order into a micro-batch until the next one does not fit. Each rank packs an equal share.

What is reported:
- efficiency: real tokens / (micro-batches that are not empty x budget).
- micro_batches: forward passes a rank; every rank takes part in the collectives of each, so the most of any rank.
- rank_imbalance: cost of the busiest rank over the mean; 1 is even.
- step_cost: the sum over rounds of the costliest rank's micro-batch, over the cost of the real tokens / ranks; 1 would
  be no padding and no waiting. FSDP's collectives make ranks wait for each other in every round.

    python -m benchmarks.packing
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from grpo_worker.trainer.packing import cost, plan_micro_batches

SHORTEST_TOKENS, LONGEST_TOKENS = 16, 8192

Layout = list[list[list[int]]]  # [rank][micro-batch] -> indices of sequences
RATIO_FIGURES = ("efficiency", "micro_batches", "rank_imbalance", "step_cost")


def lengths_of(distribution: str, sequences: int, seed: int) -> list[int]:
    """Prompt and response tokens of each sequence [sequences]."""
    rng = np.random.Generator(np.random.Philox(seed))
    if distribution == "log_normal":  # most answers short, a long tail: a reasoning model early in training
        values = rng.lognormal(np.log(1024), 0.8, sequences)
    elif distribution == "bimodal":  # short answers, and long ones near the limit
        short, long = rng.normal(400, 100, sequences), rng.normal(6000, 1200, sequences)
        values = np.where(rng.random(sequences) < 0.7, short, long)
    else:
        values = rng.uniform(SHORTEST_TOKENS, LONGEST_TOKENS, sequences)
    return [int(value) for value in np.clip(values, SHORTEST_TOKENS, LONGEST_TOKENS)]


def shares(sequences: int, ranks: int) -> list[list[int]]:
    """Equal parts of the batch in its order."""
    return [part.tolist() for part in np.array_split(np.arange(sequences), ranks)]


def packed(lengths: Sequence[int], ranks: int, budget: int) -> Layout:
    return plan_micro_batches(lengths, ranks, max_tokens=budget).ranks


def padded(lengths: Sequence[int], ranks: int, budget: int) -> Layout:
    size = budget // LONGEST_TOKENS
    return [[part[i : i + size] for i in range(0, len(part), size)] for part in shares(len(lengths), ranks)]


def sequential(lengths: Sequence[int], ranks: int, budget: int) -> Layout:
    layout: Layout = []
    for part in shares(len(lengths), ranks):
        bins: list[list[int]] = [[]]
        room = budget
        for index in part:
            if lengths[index] > room:
                bins.append([])
                room = budget
            bins[-1].append(index)
            room -= lengths[index]
        layout.append(bins)
    return layout


@dataclass(frozen=True)
class Method:
    """How a step's sequences become micro-batches, and whether these are padded."""

    plan: Callable[[Sequence[int], int, int], Layout]
    pads: bool

    def cost(self, members: Sequence[int], lengths: Sequence[int]) -> float:
        if self.pads and members:
            return len(members) * cost(max(lengths[i] for i in members))
        return sum(cost(lengths[i]) for i in members)


METHODS = {"packed": Method(packed, False), "padded": Method(padded, True), "sequential": Method(sequential, False)}


def figures(method: Method, lengths: Sequence[int], ranks: int, budget: int) -> dict[str, float]:
    """The figures of the module's docstring for one batch."""
    started = time.perf_counter()
    layout = method.plan(lengths, ranks, budget)
    seconds = time.perf_counter() - started
    assert sorted(i for rank in layout for members in rank for i in members) == list(range(len(lengths)))
    rounds = max(len(rank) for rank in layout)
    costs = [[method.cost(members, lengths) for members in rank] for rank in layout]
    loads = [sum(rank) for rank in costs]
    waiting = sum(max((rank[m] for rank in costs if m < len(rank)), default=0.0) for m in range(rounds))
    filled = sum(1 for rank in layout for members in rank if members)
    return {
        "efficiency": sum(lengths) / (filled * budget),
        "micro_batches": float(rounds),
        "rank_imbalance": max(loads) * ranks / sum(loads),
        "step_cost": waiting * ranks / sum(cost(length) for length in lengths),
        "plan_seconds": seconds,
    }


def compare(distribution: str, sequences: int, ranks: int, budget: int, seeds: int) -> dict[str, dict[str, float]]:
    """Medians over seeds of each method's figures, and of ours over each peer's."""
    runs = [
        {
            name: figures(method, lengths_of(distribution, sequences, seed), ranks, budget)
            for name, method in METHODS.items()
        }
        for seed in range(seeds)
    ]
    result = {
        name: {key: round(statistics.median(run[name][key] for run in runs), 4) for key in runs[0][name]}
        for name in METHODS
    }
    for peer in ("padded", "sequential"):
        result[f"packed_over_{peer}"] = {
            key: round(statistics.median(run["packed"][key] / run[peer][key] for run in runs), 4)
            for key in RATIO_FIGURES
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8])
    arguments = parser.parse_args()
    if arguments.budget < LONGEST_TOKENS:
        parser.error(f"--budget {arguments.budget} is under the longest sequence of {LONGEST_TOKENS} tokens")
    result = {
        "sequences": arguments.sequences,
        "budget_tokens": arguments.budget,
        "longest_tokens": LONGEST_TOKENS,
        "seeds": arguments.seeds,
        **{
            distribution: {
                f"ranks_{ranks}": compare(distribution, arguments.sequences, ranks, arguments.budget, arguments.seeds)
                for ranks in arguments.ranks
            }
            for distribution in ("log_normal", "bimodal", "uniform")
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
