"""One prompt's samples while the engine works on them: seeds, parameters, log-probs, and which weights made which token.

Invariant: the weight-version spans of a response cover [0, tokens) without gap or overlap, in order. At a swap, between two steps, each
running request's number of tokens is noted (vLLM itself labels tokens from 0.32 on only).
"""

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import xxhash

from grpo_worker.errors import GRPOError
from grpo_worker.protocol.messages import Array, SampleResult, Sampling, VersionSpan

INITIAL_VERSION = -1  # the weights that the engine loaded from the model directory, before the first sync


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a prompt: the same on every server and in every batch, and unrelated between prompts
    with adjacent seeds (vLLM's own n > 1 uses seed + index)."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{index}".encode()) >> 1


def sampling_parameters(sampling: Sampling, seed: int | None, log_probs: bool) -> Any:
    """vLLM's, of one sample: the log-prob of each sampled token or none, no text, and no output before the last token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1, max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
        min_p=sampling.min_p, seed=seed, stop_token_ids=list(sampling.stop_token_ids), ignore_eos=sampling.ignore_eos,
        logprobs=0 if log_probs else None, flat_logprobs=log_probs, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


class SampledLogProbs:
    """In place of vLLM's `LogprobsProcessor`, which at each token of each request also keeps ranks, ids and texts, in Python: with many short
    steps that is a large part of a step's time on the host. This one keeps the log-prob of the sampled token.

    Source: `vllm/v1/engine/logprobs.py`; the sampler puts the sampled token's log-prob first.
    """

    prompt_logprobs = prompt_token_id_logprobs = cumulative_logprob = None

    def __init__(self) -> None:
        self.logprobs: list[float] = []

    def update_from_output(self, output: Any) -> None:
        if output.new_logprobs is not None:
            self.logprobs += output.new_logprobs.logprobs[:, 0].tolist()


@dataclass
class VersionTrack:
    """Of one running request: (version, index of the first token that it made), oldest first."""

    changes: list[tuple[int, int]] = field(default_factory=list)

    def swapped(self, version: int, tokens: int) -> None:
        self.changes.append((version, tokens))

    def spans(self, tokens: int) -> list[VersionSpan]:
        starts = [start for _, start in self.changes] + [tokens]
        return [
            VersionSpan(version, start, end)
            for (version, start), end in zip(self.changes, starts[1:], strict=True)
            if start < min(end, tokens)
        ]


class RunningPrompt:
    """The samples of one prompt that the engine is working on."""

    def __init__(self, samples: int) -> None:
        self.unfinished: dict[str, int] = {}  # the engine's name of a request: index of its sample
        self._samples: list[tuple[Any, list[VersionSpan]] | None] = [None] * samples
        self._done: Future[list[Any]] = Future()
        self._done.set_running_or_notify_cancel()  # who stops waiting does not stop the others

    async def results(self) -> list[SampleResult]:
        """Wait for all samples. Raises EngineDeadError."""
        return [_sample_result(output, spans) for output, spans in await asyncio.wrap_future(self._done)]

    def finished(self, name: str, output: Any, spans: list[VersionSpan]) -> None:
        self._samples[self.unfinished.pop(name)] = (output, spans)
        if not self.unfinished:
            self._done.set_result(self._samples)

    def failed(self, error: GRPOError) -> None:
        self.unfinished.clear()
        self._done.set_exception(error)


@dataclass
class Request:
    """One sample, as the engine knows it."""

    prompt: RunningPrompt
    track: VersionTrack


def _sample_result(output: Any, spans: list[VersionSpan]) -> SampleResult:
    finish = output.finish_reason if output.finish_reason in ("stop", "length") else "abort"
    return SampleResult(
        token_ids=Array.of(output.token_ids, "int32"),
        log_probs=Array.of(output.logprobs or [], "float32"),
        finish_reason=cast(Literal["stop", "length", "abort"], finish),
        versions=spans,
    )
