"""Additions of two three-digit numbers, worked out column by column: `482+359=` -> `11 14 8 #### 841`.

The sums of ones, tens and hundreds come first, each with the carry from its right, then the answer behind GSM8K's marker. Sums stay
below 1000 and columns are padded (`07`), so every character has its fixed place: that is quick to learn.

Invariant: training and held-out problems are disjoint, and both are a function of the seed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

SMALLEST, LARGEST_SUM = 100, 999
MARKER = "####"
# "11 14 8 #### 841" and the end-of-sequence token.
RESPONSE_TOKENS = 17


@dataclass(frozen=True, order=True)
class Problem:
    """One addition."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)


def worked_response(problem: Problem, carries: Callable[[], bool] = lambda: True) -> str:
    """Column sums and the answer that they give; a carry for which `carries()` is false is forgotten."""
    sums, digits, carry = [], "", 0
    for place in (1, 10, 100):
        total = problem.a // place % 10 + problem.b // place % 10
        if carry and carries():
            total += 1
        carry = int(total >= 10)
        sums.append(str(total) if place == 100 else f"{total:02}")
        digits = f"{total % 10}{digits}"
    return f"{' '.join(sums)} {MARKER} {digits}"


def random_problem(rng: random.Random) -> Problem:
    """Uniform over all problems."""
    while True:
        a, b = (rng.randint(SMALLEST, LARGEST_SUM - SMALLEST) for _ in range(2))
        if a + b <= LARGEST_SUM:
            return Problem(a, b)


def split_problems(seed: int, train: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """`train` and `held_out` different problems in random order."""
    rng, chosen = random.Random(seed), dict[Problem, None]()
    while len(chosen) < train + held_out:
        chosen[random_problem(rng)] = None
    problems = list(chosen)
    return problems[:train], problems[train:]
