"""Additions of two three-digit numbers, worked out column by column: `482+359=` -> `11 14 8 #### 841`.

The sums of ones, tens and hundreds come first, each with the carry from its right, then the answer behind GSM8K's marker.

Invariant: training and held-out problems are disjoint, and both are a function of the seed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

FIRST, LAST = 100, 999
MARKER = "####"
# "18 19 19 #### 1998" and the end-of-sequence token.
MAX_RESPONSE_TOKENS = 19


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
        sums.append(str(total))
        digits = str(total if place == 100 else total % 10) + digits
    return f"{' '.join(sums)} {MARKER} {digits}"


def split_problems(seed: int, train: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """`train` and `held_out` different problems in random order."""
    count = LAST - FIRST + 1
    chosen = random.Random(seed).sample(range(count * count), train + held_out)
    problems = [Problem(FIRST + index // count, FIRST + index % count) for index in chosen]
    return problems[:train], problems[train:]
