"""From a request to results: every prompt is answered exactly once, with its samples or with an error of a known kind.

Invariant: nothing is missing silently (a prompt whose deadline passed says so), no prompt disturbs another, and when
the consumer goes away, what it asked for leaves the engine.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

from grpo_worker.protocol.messages import (
    GenerateEnd,
    GenerateRequest,
    GroupResult,
    PromptRequest,
    SampleResult,
    Sampling,
)
from grpo_worker.rollout.engine import EngineDeadError, RolloutEngine, RunningPrompt, numpy_tokens

log = logging.getLogger(__name__)


def refusal(prompt: PromptRequest, sampling: Sampling, vocab_size: int, max_model_len: int) -> GroupResult | None:
    """Why the engine must not see this prompt, or None. vLLM without a tokenizer does not check ids, and it silently
    shortens a response that does not fit into the context."""
    tokens = numpy_tokens(prompt.token_ids)
    if len(tokens) + sampling.max_tokens > max_model_len:
        message = (
            f"prompt '{prompt.id}' has {len(tokens)} tokens; with max_tokens {sampling.max_tokens} it exceeds the engine's context of "
            f"{max_model_len} tokens"
        )
        return GroupResult(id=prompt.id, samples=[], error=message, error_kind="prompt_too_long")
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        position = int(((tokens < 0) | (tokens >= vocab_size)).argmax())
        message = f"prompt '{prompt.id}': token id {tokens[position]} at position {position} is outside the vocabulary 0..{vocab_size - 1}"
        return GroupResult(id=prompt.id, samples=[], error=message, error_kind="token_out_of_range")
    return None


async def generate(engine: RolloutEngine, request: GenerateRequest) -> AsyncGenerator[GroupResult | GenerateEnd, None]:
    """Results as they finish, then the end. Close the iterator to abort what is left."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    deadline = started + request.deadline_seconds
    generated_tokens = 0
    accepted: list[PromptRequest] = []
    for prompt in request.prompts:
        if (refused := refusal(prompt, request.sampling, engine.vocab_size, engine.max_model_len)) is not None:
            yield refused
        else:
            accepted.append(prompt)
    waiting = {prompt.id for prompt in accepted}
    groups: dict[str, RunningPrompt] = {}
    tasks: dict[asyncio.Task[list[SampleResult]], str] = {}
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout_at(deadline):
                await stack.enter_async_context(engine.gate.exclusive() if request.atomic else engine.gate.shared())
                stack.callback(_drop, engine, groups, tasks)  # before the gate opens for others
                running, failed = await engine.admit(request.request_id, accepted, request.sampling)
                groups.update(running)
        except TimeoutError:
            log.warning(
                "request %s: its deadline of %s s passed before the engine took it",
                request.request_id,
                request.deadline_seconds,
            )
            failed = {}
        except EngineDeadError as error:
            failed = {prompt.id: error for prompt in accepted}
        for name, why in failed.items():
            waiting.discard(name)
            yield _failure(name, why)
        tasks.update({asyncio.create_task(group.results()): name for name, group in groups.items()})
        while tasks:
            done, _ = await asyncio.wait(
                tasks, timeout=max(0.0, deadline - loop.time()), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            for task in done:
                name = tasks.pop(task)
                result = _result(name, task)
                waiting.discard(name)
                del groups[name]
                generated_tokens += sum(len(sample.token_ids.numpy()) for sample in result.samples)
                yield result
    for prompt in accepted:
        if prompt.id in waiting:
            message = f"prompt '{prompt.id}' was not finished within {request.deadline_seconds} s"
            yield GroupResult(id=prompt.id, samples=[], error=message, error_kind="deadline")
    yield GenerateEnd(request_id=request.request_id, seconds=loop.time() - started, generated_tokens=generated_tokens)


def _result(name: str, task: "asyncio.Task[list[SampleResult]]") -> GroupResult:
    try:
        return GroupResult(id=name, samples=task.result())
    except Exception as error:
        return _failure(name, error)


def _failure(name: str, error: Exception) -> GroupResult:
    log.error("prompt '%s' failed in the engine: %s: %s", name, type(error).__name__, error)
    return GroupResult(
        id=name,
        samples=[],
        error=f"prompt '{name}' failed in the engine: {error}",
        error_kind="engine_dead" if isinstance(error, EngineDeadError) else "engine",
    )


def _drop(
    engine: RolloutEngine, groups: dict[str, RunningPrompt], tasks: "dict[asyncio.Task[list[SampleResult]], str]"
) -> None:
    """Cancel and abort what has not finished."""
    for task in tasks:
        task.cancel()
    engine.abort(list(groups.values()))
    tasks.clear()
    groups.clear()
