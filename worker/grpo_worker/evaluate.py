"""`grpo eval`: the document's validation of any checkpoint, without a run: one engine in this process, the same prompts, sampling and graders.

Invariant: the numbers are those that a validation of a run with the same weights gives; nothing of a run's directory is changed.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_worker.config import Spec
from grpo_worker.config.actor import Model
from grpo_worker.coordinator.build import dispatch_options, reward_pool
from grpo_worker.coordinator.dispatch import DispatchOptions, prompt_request, samples_of
from grpo_worker.coordinator.groups import Group
from grpo_worker.coordinator.prompts import open_tokenizer, open_validation_prompts
from grpo_worker.coordinator.rollout_dump import RolloutDump
from grpo_worker.coordinator.scoring import Scorer
from grpo_worker.coordinator.validation import Validation, ValidationResult
from grpo_worker.errors import UsageError
from grpo_worker.protocol.messages import GenerateRequest, GroupResult
from grpo_worker.rollout.engine import RolloutEngine
from grpo_worker.rollout.generation import generate
from grpo_worker.rollout.options import EngineOptions


class EngineDispatcher:
    """In the place of the coordinator's dispatcher: one engine, in this process."""

    def __init__(self, engine: RolloutEngine, options: DispatchOptions) -> None:
        self._engine, self._options = engine, options
        self._groups: dict[str, Group] = {}

    def submit(self, groups: Sequence[Group], *, atomic: bool) -> None:
        self._groups |= {group.uid: group for group in groups}

    async def run(self, *, until_idle: bool = False) -> None:
        """Until each group has its samples, or says why it has none."""
        options, groups = self._options, self._groups
        request = GenerateRequest(
            request_id=options.purpose,
            prompts=[prompt_request(options, group) for group in groups.values()],
            sampling=options.sampling,
            deadline_seconds=options.deadline_seconds * options.waves(len(groups)),
            atomic=True,
        )
        async for result in generate(self._engine, request):
            if isinstance(result, GroupResult):
                group = groups[result.id]
                group.samples, group.failure = samples_of(result), result.error or ""


def evaluate(spec: Spec, model: Path, dump: Path | None = None) -> dict[str, float]:
    """Metrics in the names of a run (`val/...`).

    Args:
        model: directory of the weights, in place of `model.path`.
        dump: directory for the greedy answers, as `trainer.rolloutDump` writes them.

    Raises:
        UsageError: no validation files. DataError: data, tokenizer or graders that cannot be used.
    """
    if not spec.data.validation_files:
        raise UsageError("data.validationFiles: none. Name files with --data, or in the document.")
    result = asyncio.run(_evaluate(spec, model))
    if dump is not None:
        RolloutDump(dump).write("validation", 0, {"validation": result.groups})
    return result.metrics


async def _evaluate(spec: Spec, model: Path) -> ValidationResult:
    tokenizer = open_tokenizer(spec, model)
    prompts, _ = open_validation_prompts(spec, tokenizer.tokenizer)
    options = dispatch_options(spec, tokenizer)
    length = spec.rollout.context_tokens(spec.data.max_prompt_length, spec.data.max_response_length)
    engine = RolloutEngine(EngineOptions(Model(path=str(model)), spec.rollout, max_model_len=length))

    def make(options: DispatchOptions, _: Any) -> EngineDispatcher:
        return EngineDispatcher(engine, options)

    async with reward_pool(spec, lambda message: None) as pool:  # wrong graders are told before the engine starts
        scorer = Scorer(pool, tokenizer.tokenizer, minimum_samples=1, filter_metric=None, max_failure_ratio=1.0)
        try:
            await engine.start()
            return await Validation(prompts, options, spec.rollout.validation, atomic=True).run(make, scorer)
        finally:
            await scorer.close()
            engine.shutdown()
