"""What an agent may do with an episode, and the sample that comes of it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from coordinator_helpers import prompt
from transformers import PreTrainedTokenizerBase

from grpo_worker.coordinator.agents.episode import Episode, NoRoomError, TurnRequest
from grpo_worker.protocol.messages import Array, SampleResult, VersionSpan

pytestmark = pytest.mark.asyncio


class Script:
    """An engine that says prepared turns; every turn's tokens are of two versions when they are two or more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *texts: str) -> None:
        self.tokenizer = tokenizer
        self.texts = list(texts)
        self.requests: list[TurnRequest] = []

    async def __call__(self, request: TurnRequest) -> SampleResult:
        self.requests.append(request)
        tokens = self.tokenizer.encode(self.texts.pop(0))[: request.max_tokens]
        turn = float(len(self.requests))
        half = len(tokens) // 2
        spans = [VersionSpan(int(turn), 0, half), VersionSpan(int(turn) + 1, half, len(tokens))]
        return SampleResult(
            token_ids=Array.of(tokens, "int32"),
            log_probs=Array.of([-turn] * len(tokens), "float32"),
            finish_reason="length" if len(tokens) == request.max_tokens else "stop",
            versions=spans if half else spans[1:],
        )


def episode(
    tokenizer: PreTrainedTokenizerBase, ask: Callable[[TurnRequest], Awaitable[SampleResult]], *, room: int = 20, context: int = 100,
) -> Episode:  # fmt: skip
    asked = replace(prompt(0), token_ids=tokenizer.encode("2+3="))
    return Episode(asked, tokenizer, max_response_tokens=room, max_model_tokens=context, ask=ask)


async def test_a_sample_is_what_was_said_and_observed_in_order(tokenizer: PreTrainedTokenizerBase) -> None:
    script = Script(tokenizer, "abcd", "ef")
    made = episode(tokenizer, script)
    first = await made.generate(max_tokens=10, stop_token_ids=[3])
    assert (first.text, first.finish_reason) == ("abcd", "stop")
    assert made.observe("xyz") == tokenizer.encode("xyz")
    await made.generate()
    made.observe([5])
    sample = made.sample()
    assert tokenizer.decode(sample.token_ids.tolist()) == "abcdxyzef" + tokenizer.decode([5])
    assert sample.mask is not None
    assert sample.mask.tolist() == [True] * 4 + [False] * 3 + [True] * 2 + [False]
    assert sample.log_probs.tolist() == [-1.0] * 4 + [0.0] * 3 + [-2.0] * 2 + [0.0]
    assert sample.versions == [VersionSpan(1, 0, 2), VersionSpan(2, 2, 4), VersionSpan(2, 7, 8), VersionSpan(3, 8, 9)]
    assert (sample.oldest_version, sample.turns, sample.finish_reason) == (1, 2, "stop")


async def test_each_turn_is_asked_for_with_all_tokens_so_far(tokenizer: PreTrainedTokenizerBase) -> None:
    script = Script(tokenizer, "abcd", "ef")
    made = episode(tokenizer, script)
    await made.generate(max_tokens=10, stop_token_ids=[3])
    made.observe("xyz")
    await made.generate()
    assert script.requests == [
        TurnRequest(0, tokenizer.encode("2+3="), 10, [3]),
        TurnRequest(1, tokenizer.encode("2+3=abcdxyz"), 20 - 7, []),
    ]
    assert made.token_ids == tokenizer.encode("2+3=abcdxyzef")


@pytest.mark.parametrize(("room", "context", "left"), [(20, 100, 20), (20, 10, 6), (5, 9, 5)])
async def test_both_limits_count(tokenizer: PreTrainedTokenizerBase, room: int, context: int, left: int) -> None:
    made = episode(tokenizer, Script(tokenizer, "abcdefghijklmnopqrstuvwxyz"), room=room, context=context)
    assert made.tokens_left == left
    made.observe("1")
    turn = await made.generate(max_tokens=1000)
    assert len(turn.token_ids) == left - 1
    assert (turn.finish_reason, made.tokens_left) == ("length", 0)
    with pytest.raises(NoRoomError, match=r"no tokens left.*maxResponseLength"):
        await made.generate()


async def test_an_observation_that_does_not_fit_is_refused_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    made = episode(tokenizer, Script(tokenizer), room=3)
    with pytest.raises(NoRoomError, match=r"4 tokens do not fit, 3 are left .*raise data\.maxResponseLength"):
        made.observe("1234")
    assert made.tokens_left == 3
    made.observe("123")
    assert made.tokens_left == 0


async def test_a_token_outside_the_vocabulary_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"token id 64 is outside the vocabulary 0\.\.63"):
        episode(tokenizer, Script(tokenizer)).observe([1, 64])


async def test_an_episode_without_a_sampled_token_has_no_sample(tokenizer: PreTrainedTokenizerBase) -> None:
    made = episode(tokenizer, Script(tokenizer))
    made.observe("123")
    with pytest.raises(ValueError, match="without one sampled token"):
        made.sample()


async def test_two_turns_at_a_time_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    release = asyncio.Event()
    script = Script(tokenizer, "ab")

    async def waits(request: TurnRequest) -> SampleResult:
        await release.wait()
        return await script(request)

    made = episode(tokenizer, waits)
    first = asyncio.create_task(made.generate())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="under way"):
        await made.generate()
    with pytest.raises(RuntimeError, match="under way"):
        made.observe("1")
    release.set()
    assert (await first).text == "ab"


async def test_nothing_is_added_to_an_episode_that_is_over(tokenizer: PreTrainedTokenizerBase) -> None:
    made = episode(tokenizer, Script(tokenizer, "ab", "cd"))
    await made.generate()
    made.close()
    with pytest.raises(RuntimeError, match="over"):
        made.observe("1")
    with pytest.raises(RuntimeError, match="over"):
        await made.generate()
    assert len(made.sample().token_ids) == 2
