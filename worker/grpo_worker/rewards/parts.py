"""Several rewards of one response, as one: the weighted sum of those that are for its source.

Invariant: a part's own score is in the result beside the sum, under its name, so that metrics and samples tell what the sum is made of.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_worker.rewards.base import RewardFunction, RewardInput, RewardResult

if TYPE_CHECKING:
    from grpo_worker.config.data import RewardPart


@dataclass(frozen=True)
class Part:
    """`sources`: of rows whose `data_source` is one of these, or begins with one that ends in `*`; none: of all rows."""

    name: str
    function: RewardFunction
    weight: float
    sources: Sequence[str]

    def judges(self, source: str) -> bool:
        return not self.sources or any(
            source.startswith(known[:-1]) if known.endswith("*") else source == known for known in self.sources
        )


def combined(parts: Sequence[Part]) -> RewardFunction:
    """The accuracy is that of the first part, in the order of the document, that gives one."""

    def asked(sample: RewardInput) -> list[Part]:
        source = str(sample.data.get("data_source") or "")
        found = [part for part in parts if part.judges(source)]
        if not found:
            raise ValueError(
                f"no part of reward.parts is for data_source {source!r}. Add it to the sources of one, or give one no sources."
            )
        return found

    def score(sample: RewardInput) -> RewardResult:
        found = asked(sample)
        return _sum(found, [part.function(sample) for part in found])

    async def score_async(sample: RewardInput) -> RewardResult:
        import asyncio  # most workers have no use for it

        async def of(part: Part) -> RewardResult:
            result = part.function(sample)
            return await result if inspect.isawaitable(result) else result

        found = asked(sample)
        return _sum(found, await asyncio.gather(*map(of, found)))

    return score_async if any(inspect.iscoroutinefunction(part.function) for part in parts) else score


def _sum(parts: Sequence[Part], results: Sequence[RewardResult]) -> RewardResult:
    extra: dict[str, float] = {}
    for part, result in zip(parts, results, strict=True):
        extra[part.name] = result.score
        extra |= {f"{part.name}/{name}": value for name, value in result.extra.items()}
    total = sum(part.weight * result.score for part, result in zip(parts, results, strict=True))
    judge = next((result for result in results if result.accuracy is not None), RewardResult(total))
    return RewardResult(total, judge.accuracy, extra, judge.answer)


def as_options(parts: Sequence["RewardPart"], common: Mapping[str, Any]) -> dict[str, Any]:
    """The document's parts as plain values, for `lookup.resolve` in a worker; `common`: keyword arguments of each."""
    return {
        "parts": [
            {
                "name": part.name,
                "function": part.function,
                "options": {**common, **part.options},
                "weight": part.weight,
                "sources": list(part.sources),
            }
            for part in parts
        ]
    }
