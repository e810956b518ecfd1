"""How good the policy is on held-out prompts, all of them and by source: greedy pass@1, and what several sampled answers show.

Invariant: validation sees every validation prompt once, with the weights in service, and changes nothing that training depends on: it
has its own requests, seeds and cursor.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import comb
from statistics import fmean
from typing import Protocol

from grpo_worker.config.rollout import ValidationSampling
from grpo_worker.coordinator.dispatch import DispatchOptions, RolloutDispatcher
from grpo_worker.coordinator.groups import Group
from grpo_worker.coordinator.scoring import FailureCount, Scorer
from grpo_worker.data.dataset import Prompt
from grpo_worker.errors import DataError
from grpo_worker.protocol.messages import Sampling
from grpo_worker.rewards.base import RewardResult

OnDone = Callable[[Group], None]


class Generates(Protocol):
    """What validation asks of a dispatcher."""

    def submit(self, groups: Sequence[Group], *, atomic: bool) -> None: ...

    async def run(self, *, until_idle: bool = False) -> None: ...


MakeDispatcher = Callable[[DispatchOptions, OnDone], RolloutDispatcher]
MakeGenerator = Callable[[DispatchOptions, OnDone], Generates]


@dataclass(frozen=True)
class ValidationResult:
    """Metrics in verl's manner, and the greedy groups for the sample log."""

    metrics: dict[str, float]
    groups: list[Group]

    @property
    def headline(self) -> str:
        """The greedy answers in two words: their accuracy, or their score where the reward function gives no accuracy."""
        kind = "accuracy" if "val/accuracy/pass@1" in self.metrics else "score"
        return f"{kind} {self.metrics[f'val/{kind}/pass@1']:.3f}"


class Validation:
    """Runs the validation prompts through the engines in service."""

    def __init__(
        self,
        prompts: list[Prompt],
        options: DispatchOptions,
        sampled: ValidationSampling,
        *,
        atomic: bool,
    ) -> None:
        """
        Args:
            options: of the training requests; sampling, seed and purpose are replaced, and nobody reads log-probs.
            sampled: of mean@n; n = 1 leaves it out.
            atomic: the engines are idle meanwhile, so make the results independent of timing.
        """
        options = replace(options, log_probs_one_in=0)
        greedy = replace_sampling(options.sampling, n=1, temperature=0.0, top_p=1.0)
        self._passes = [replace(options, sampling=greedy, purpose="validation-greedy", seed=None)]
        if sampled.n > 1:
            sampling = replace_sampling(
                options.sampling, n=sampled.n, temperature=sampled.temperature, top_p=sampled.top_p
            )
            self._passes.append(replace(options, sampling=sampling, purpose="validation-sampled"))
        self._prompts = prompts
        self._atomic = atomic

    @property
    def prompts(self) -> int:
        return len(self._prompts)

    async def run(self, make_dispatcher: MakeGenerator, scorer: Scorer) -> ValidationResult:
        """Raises DataError when no answer at all could be scored."""
        metrics: dict[str, float] = {}
        greedy: list[Group] = []
        for options in self._passes:
            groups = await self._generate(make_dispatcher, options)
            counts = FailureCount()
            await asyncio.gather(*(scorer.score(group, counts) for group in groups))
            if not any(group.samples for group in groups):
                failure = counts.last_message or next((group.failure for group in groups), "")
                raise DataError(
                    f"validation: none of {len(groups)} prompts could be answered and scored. The last failure: {failure}"
                )
            if options.sampling.n == 1:
                greedy = groups
                lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
                metrics["val/response_length/mean"] = sum(lengths) / len(lengths)
            for prefix, some in by_source(groups).items():
                metrics |= {f"{prefix}/{name}": value for name, value in measures(some, options.sampling.n).items()}
        return ValidationResult(metrics, greedy)

    async def _generate(self, make_dispatcher: MakeGenerator, options: DispatchOptions) -> list[Group]:
        groups = [Group(order=order, prompt=prompt) for order, prompt in enumerate(self._prompts)]
        dispatcher = make_dispatcher(options, lambda group: None)
        dispatcher.submit(groups, atomic=self._atomic)
        await dispatcher.run(until_idle=True)
        return groups


def replace_sampling(sampling: Sampling, *, n: int, temperature: float, top_p: float) -> Sampling:
    """The same limits and stop tokens with another distribution; temperature 0 is greedy."""
    return Sampling(
        n=n,
        max_tokens=sampling.max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=-1,
        stop_token_ids=sampling.stop_token_ids,
    )


def by_source(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """All of them as `val`, and, where the rows' `data_source` differs, those of each source as `val/SOURCE`."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(f"val/{group.prompt.data.get('data_source', '')}", []).append(group)
    return {"val": list(groups), **(found if len(found) > 1 else {})}


def measures(groups: Sequence[Group], n: int) -> dict[str, float]:
    """Means over prompts, of those with a sample that could be scored; `failed` counts the others.

    Of one sample a prompt, `pass@1`. Of n: `mean@n`; `pass@k` and `best@k`, the expected highest accuracy and score of k of the samples, which for
    right and wrong is the unbiased estimate of Chen et al. (arXiv 2107.03374); `maj@n`, the accuracy of the answer that most samples gave.
    """
    rewards = [[sample.reward for sample in group.samples if sample.reward is not None] for group in groups]
    scored = [some for some in rewards if some]
    name = "pass@1" if n == 1 else f"mean@{n}"
    found = {f"failed/{name}": float(len(groups) - len(scored))}
    accuracies = [
        accuracy for some in scored if (accuracy := [one.accuracy for one in some if one.accuracy is not None])
    ]
    scores = [[one.score for one in some] for some in scored]
    found |= _mean(f"accuracy/{name}", map(fmean, accuracies)) | _mean(f"score/{name}", map(fmean, scores))
    for k in sorted({*(2**power for power in range(1, n.bit_length())), n} - {1}):
        found |= _mean(f"accuracy/pass@{k}", (best_of(some, k) for some in accuracies if len(some) >= k))
        found |= _mean(f"score/best@{k}", (best_of(some, k) for some in scores if len(some) >= k))
    if n > 1:
        found |= _mean(f"accuracy/maj@{n}", (vote for some in scored if (vote := majority(some)) is not None))
    return found


def best_of(values: Sequence[float], k: int) -> float:
    """Expectation of the highest of k of the values, drawn without putting back."""
    return sum(value * comb(below, k - 1) for below, value in enumerate(sorted(values))) / comb(len(values), k)


def majority(rewards: Sequence[RewardResult]) -> float | None:
    """Mean accuracy of the answer that most gave; answers with as many votes share it. None without accuracies, or answers to compare."""
    votes: dict[str, list[float]] = {}
    for one in rewards:
        if one.accuracy is None or one.answer is None:
            return None
        votes.setdefault(one.answer, []).append(one.accuracy)
    votes = {answer: accuracies for answer, accuracies in votes.items() if answer} or votes  # none found is no vote
    most = max(map(len, votes.values()))
    return fmean(fmean(accuracies) for accuracies in votes.values() if len(accuracies) == most)


def _mean(name: str, values: Iterable[float]) -> dict[str, float]:
    """Nothing without a value."""
    found = list(values)
    return {name: fmean(found)} if found else {}
