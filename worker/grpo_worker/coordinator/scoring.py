"""From generated groups to scored ones: the reward node of the pipeline.

Invariant: a sample whose reward could not be computed is left out of its group and counted; it never gets a zero. A group with too few
samples left to compare is a failed group.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

from transformers import PreTrainedTokenizerBase

from grpo_worker.algorithms import has_signal
from grpo_worker.coordinator.groups import Group, GroupState, Sample
from grpo_worker.coordinator.spans import Spans
from grpo_worker.errors import DataError
from grpo_worker.rewards.base import RewardInput
from grpo_worker.rewards.pool import RewardOutcome, RewardPool


@dataclass
class ScoreRange:
    """Lowest and highest score of so many samples, and how many groups had different ones: what there is to say when nothing could be
    learned from them."""

    samples: int = 0
    varied: int = 0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, groups: Iterable[Group]) -> Self:
        for group in groups:
            scores = [sample.reward.score for sample in group.samples if sample.reward]
            self.samples += len(scores)
            self.varied += bool(scores) and has_signal(scores)
            self.lowest, self.highest = min([self.lowest, *scores]), max([self.highest, *scores])
        return self

    def verdict(self) -> str:
        """The scores in words, and what to look at."""
        if self.varied:
            return (
                f"the scores of {self.varied} groups differed, so the cause is another: gradients that are not finite (actor/grad_norm; "
                "actor.optim.lr), or responses that were rejected whole (algorithm.rolloutCorrection)."
            )
        if self.lowest < self.highest:
            return (
                f"the {self.samples} samples scored from {self.lowest:g} to {self.highest:g}, but those of one prompt always the same. "
                "Take prompts that the model solves now and then, or raise rollout.n."
            )
        all_scored = f"all {self.samples} samples scored {self.lowest:g}"
        if self.lowest == 0:
            return (
                f"{all_scored}. Is the reward function right? samples.jsonl shows what it was given. If it is, the prompts are too hard "
                "for this model, or the responses too short for an answer (data.maxResponseLength)."
            )
        if self.lowest == 1:
            return f"{all_scored}. The prompts are too easy for this model: take harder ones."
        return f"{all_scored}. Does the reward function look at the response? samples.jsonl shows what it was given."


def nothing_to_train(step: int, filtered: Sequence[Group], failed: Sequence[Group]) -> DataError:
    """Why a step has no group to train on."""
    if filtered:
        return DataError(
            f"algorithm.filterGroups: step {step}: within each of {len(filtered)} groups all samples scored the same, so there is nothing "
            f"to learn from: {ScoreRange().add(filtered).verdict()}"
        )
    return DataError(
        f"step {step}: none of its {len(failed)} prompts could be trained on. The last one, {failed[-1].uid}: {failed[-1].failure}"
    )


@dataclass
class FailureCount:
    """Samples of the current step that were tried and that failed, and calls that the reward function asked to make again."""

    scored: int = 0
    failed: int = 0
    tried_again: int = 0
    last_message: str = ""
    kinds: dict[str, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        kinds = {**self.kinds, **({"tried_again": self.tried_again} if self.tried_again else {})}
        return {"reward/failures": float(self.failed), **{f"reward/{kind}": float(n) for kind, n in kinds.items()}}


class Scorer:
    """Decodes, scores and filters groups as they arrive."""

    def __init__(
        self,
        pool: RewardPool,
        tokenizer: PreTrainedTokenizerBase,
        *,
        minimum_samples: int,
        filter_metric: str | None,
        max_failure_ratio: float,
        spans: Spans | None = None,
    ) -> None:
        """
        Args:
            minimum_samples: a group with fewer scored samples has failed.
            filter_metric: `score` or `accuracy` for dynamic sampling, None for none.
            spans: gets one of each group.
        """
        self._pool = pool
        self._spans = spans or Spans()
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._minimum_samples = minimum_samples
        self._filter_metric = filter_metric
        self._max_failure_ratio = max_failure_ratio
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="decode"
        )  # one: batch_decode then never races with itself
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self.counts = FailureCount()

    def submit(self, group: Group, on_end: Callable[[Group], None]) -> None:
        """Score a group in the background; `on_end` is called when it is READY, FILTERED or FAILED."""
        task = asyncio.create_task(self._run(group, on_end))
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def raise_failure(self) -> None:
        """Raise what went wrong in the background (DataError, RetryableError)."""
        if self._error is not None:
            raise self._error

    def take_counts(self) -> FailureCount:
        """Counts since the last call. Raises DataError when more samples failed than the job allows."""
        counts, self.counts = self.counts, FailureCount()
        tried = counts.scored + counts.failed
        if counts.failed > self._max_failure_ratio * tried:
            raise DataError(
                f"reward.function: {self._pool.function_name}: {counts.failed} of {tried} samples of this step could not be scored ({_kinds(counts)}), more than "
                f"reward.maxFailureRatio = {self._max_failure_ratio:g}. The last one: {counts.last_message}"
            )
        return counts

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def score(self, group: Group, counts: FailureCount | None = None) -> None:
        """Fill in text and reward of each sample; samples that cannot be scored are removed.

        Args:
            counts: takes the outcomes in place of the step's own counts (validation is no part of a step).
        """
        if not group.samples:
            return
        await asyncio.get_running_loop().run_in_executor(self._thread, self._decode, group.samples)
        outcomes = await self._pool.score_many([_reward_input(group, sample) for sample in group.samples])
        group.samples = [
            sample
            for sample, outcome in zip(group.samples, outcomes, strict=True)
            if self._accept(group, sample, outcome, self.counts if counts is None else counts)
        ]

    async def _run(self, group: Group, on_end: Callable[[Group], None]) -> None:
        with self._spans.of("rewards", "score", prompt=group.uid):
            await self.score(group)
        if len(group.samples) < self._minimum_samples:
            group.state = GroupState.FAILED
            group.failure = f"only {len(group.samples)} samples could be scored: {self.counts.last_message}"
        elif self._filter_metric and not has_signal(_values(group, self._filter_metric)):
            group.state = GroupState.FILTERED
        else:
            group.state = GroupState.READY
        on_end(group)

    def _accept(self, group: Group, sample: Sample, outcome: RewardOutcome, counts: FailureCount) -> bool:
        counts.tried_again += outcome.refusals
        if outcome.failure is None:
            sample.reward = outcome.result
            counts.scored += 1
            return True
        kind = outcome.failure.kind
        counts.failed += 1
        counts.kinds[kind] = counts.kinds.get(kind, 0) + 1
        counts.last_message = f"prompt {group.uid}, {kind}: {outcome.failure.message}"
        return False

    def _decode(self, samples: Sequence[Sample]) -> None:
        """Fill in the texts: without special tokens, and with all but the one that ended the response."""
        token_ids = [sample.token_ids.tolist() for sample in samples]
        bodies = [ids[:-1] if ids and ids[-1] in self._special_ids else ids for ids in token_ids]
        texts = self._tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        raw_texts = self._tokenizer.batch_decode(bodies, skip_special_tokens=False)
        for sample, text, raw_text in zip(samples, texts, raw_texts, strict=True):
            sample.text, sample.raw_text = text, raw_text

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._error is None:
            self._error = task.exception()


def _reward_input(group: Group, sample: Sample) -> RewardInput:
    prompt = group.prompt
    return RewardInput(
        prompt=prompt.text,
        response=sample.text,
        ground_truth=prompt.ground_truth,
        data=prompt.data,
        response_tokens=len(sample.token_ids),
        finish_reason=sample.finish_reason,
        uid=group.uid,
        raw_response=sample.raw_text,
        token_ids=sample.token_ids.tolist(),
    )


def _values(group: Group, metric: str) -> list[float]:
    rewards = [sample.reward for sample in group.samples if sample.reward is not None]
    if metric == "accuracy" and all(reward.accuracy is not None for reward in rewards):
        return [float(reward.accuracy) for reward in rewards if reward.accuracy is not None]
    return [reward.score for reward in rewards]


def _kinds(counts: FailureCount) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.kinds.items()))
