"""How good the policy is on held-out prompts: greedy pass@1, and mean@k of sampled answers.

Invariant: validation sees every validation prompt once, with the weights in service, and changes nothing that training depends on: it
has its own requests, seeds and cursor.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from grpo_worker.config.rollout import ValidationSampling
from grpo_worker.coordinator.dispatch import DispatchOptions, RolloutDispatcher
from grpo_worker.coordinator.groups import Group
from grpo_worker.coordinator.scoring import FailureCount, Scorer
from grpo_worker.data.dataset import Prompt
from grpo_worker.errors import DataError
from grpo_worker.protocol.messages import Sampling

OnDone = Callable[[Group], None]
MakeDispatcher = Callable[[DispatchOptions, OnDone], RolloutDispatcher]


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

    async def run(self, make_dispatcher: MakeDispatcher, scorer: Scorer) -> ValidationResult:
        """Raises DataError when no answer at all could be scored."""
        metrics: dict[str, float] = {}
        greedy: list[Group] = []
        for options in self._passes:
            groups = await self._generate(make_dispatcher, options)
            counts = FailureCount()
            await asyncio.gather(*(scorer.score(group, counts) for group in groups))
            per_prompt = [_mean(group) for group in groups if group.samples]
            if not per_prompt:
                failure = counts.last_message or next((group.failure for group in groups), "")
                raise DataError(
                    f"validation: none of {len(groups)} prompts could be answered and scored. The last failure: {failure}"
                )
            name = "pass@1" if options.sampling.n == 1 else f"mean@{options.sampling.n}"
            accuracies = [accuracy for accuracy, _ in per_prompt if accuracy is not None]
            if accuracies:
                metrics[f"val/accuracy/{name}"] = sum(accuracies) / len(accuracies)
            metrics[f"val/score/{name}"] = sum(score for _, score in per_prompt) / len(per_prompt)
            if options.sampling.n == 1:
                greedy = groups
                lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
                metrics["val/response_length/mean"] = sum(lengths) / len(lengths)
            metrics[f"val/failed/{name}"] = float(len(groups) - len(per_prompt))
        return ValidationResult(metrics, greedy)

    async def _generate(self, make_dispatcher: MakeDispatcher, options: DispatchOptions) -> list[Group]:
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


def _mean(group: Group) -> tuple[float | None, float]:
    """Mean accuracy of a group, None where the reward function gives none, and mean score."""
    rewards = [sample.reward for sample in group.samples if sample.reward is not None]
    accuracies = [reward.accuracy for reward in rewards if reward.accuracy is not None]
    return sum(accuracies) / len(accuracies) if accuracies else None, sum(r.score for r in rewards) / len(rewards)
