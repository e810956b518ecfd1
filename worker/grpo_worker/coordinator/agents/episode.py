"""One sample in the making: what an agent sees and may do.

Invariant: tokens in, tokens out. The sample is the token ids that the engine returned and those that were observed, in order, and each
continuation is asked for with exactly these ids; nothing is decoded and encoded again. Tokens that the engine sampled have mask True and
its log-probs; observed ones have mask False and log-prob 0. An episode is used by one thread at a time.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo_worker.coordinator.groups import Sample
from grpo_worker.data.dataset import Prompt
from grpo_worker.protocol.messages import SampleResult, VersionSpan


class NoRoomError(ValueError):
    """An episode has no room for what was asked of it. `tokens_left` says before how much there is."""


@dataclass(frozen=True)
class Turn:
    """One continuation that the engine sampled."""

    token_ids: list[int]  # with the token that it stopped at
    text: str  # decoded, without special tokens
    finish_reason: str  # stop, or length: `max_tokens` or all that was left


@dataclass(frozen=True)
class TurnRequest:
    """What an episode asks an engine for."""

    turn: int  # 0-based
    token_ids: list[int]  # prompt and all so far
    max_tokens: int
    stop_token_ids: list[int]


AskEngine = Callable[[TurnRequest], Awaitable[SampleResult]]


class Episode:
    """The conversation about one prompt, of which one sample is made."""

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_response_tokens: int,
        max_model_tokens: int,
        ask: AskEngine,
    ) -> None:
        """
        Args:
            max_response_tokens: of sampled and observed tokens together (data.maxResponseLength).
            max_model_tokens: of prompt and response (the engine's context).
            ask: samples one continuation.
        """
        self.prompt = prompt
        self.tokenizer = tokenizer
        self._max_response_tokens = max_response_tokens
        self._max_model_tokens = max_model_tokens
        self._ask = ask
        self._response: list[int] = []
        self._log_probs: list[float] = []
        self._mask: list[bool] = []
        self._versions: list[VersionSpan] = []
        self._turns: list[Turn] = []
        self._asking = False
        self._closed = False

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response so far."""
        return [*self.prompt.token_ids, *self._response]

    @property
    def turns(self) -> list[Turn]:
        """The continuations so far."""
        return list(self._turns)

    @property
    def tokens_left(self) -> int:
        """How many more tokens fit: of data.maxResponseLength, and of the engine's context."""
        used = len(self._response)
        return max(0, min(self._max_response_tokens - used, self._max_model_tokens - len(self.prompt.token_ids) - used))

    async def generate(self, max_tokens: int | None = None, stop_token_ids: Sequence[int] | None = None) -> Turn:
        """Let the policy go on from everything so far.

        Args:
            max_tokens: of this turn; at most, and by default, `tokens_left`.
            stop_token_ids: end the turn at these tokens too; the end-of-sequence tokens always end it.

        Raises NoRoomError when no token is left.
        """
        self._check_open("generate")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"generate: max_tokens is {max_tokens}, must be at least 1")
        if self.tokens_left == 0:
            raise NoRoomError(f"generate: no tokens left ({self._room()}). End the episode when tokens_left is 0.")
        request = TurnRequest(
            len(self._turns), self.token_ids, min(max_tokens or self.tokens_left, self.tokens_left), [*(stop_token_ids or ())]
        )  # fmt: skip
        self._asking = True
        try:
            result = await self._ask(request)
        finally:
            self._asking = False
        self._check_open("generate")  # it may have been given up meanwhile
        return self._append(result)

    def observe(self, observation: str | Sequence[int]) -> list[int]:
        """Add what did not come from the policy: a tool's answer, the next question. It is context, and is not trained on.

        Args:
            observation: text, encoded as it is (no special tokens are added), or token ids.

        Returns the token ids. Raises NoRoomError when they do not fit: all or nothing is added.
        """
        self._check_open("observe")
        tokens = (
            self.tokenizer.encode(observation, add_special_tokens=False)
            if isinstance(observation, str)
            else [int(token) for token in observation]
        )
        if len(tokens) > self.tokens_left:
            raise NoRoomError(
                f"observe: {len(tokens)} tokens do not fit, {self.tokens_left} are left ({self._room()}). "
                "Shorten the observation, end the episode, or raise data.maxResponseLength."
            )
        vocabulary = len(self.tokenizer)
        if unknown := [token for token in tokens if not 0 <= token < vocabulary]:
            raise ValueError(f"observe: token id {unknown[0]} is outside the vocabulary 0..{vocabulary - 1}")
        self._response += tokens
        self._log_probs += [0.0] * len(tokens)
        self._mask += [False] * len(tokens)
        return tokens

    def close(self) -> None:
        """Nothing may be added any more."""
        self._closed = True

    @property
    def closed(self) -> bool:
        return self._closed

    def sample(self) -> Sample:
        """What was made. Raises ValueError when the policy sampled no token of it."""
        if not any(self._mask):
            raise ValueError(
                "the agent ended without one sampled token. Call `await episode.generate()` at least once."
            )
        return Sample(
            token_ids=np.array(self._response, dtype=np.int32),
            log_probs=np.array(self._log_probs, dtype=np.float32),
            finish_reason=self._turns[-1].finish_reason,
            versions=list(self._versions),
            mask=np.array(self._mask, dtype=bool),
            turns=len(self._turns),
        )

    def _append(self, result: SampleResult) -> Turn:
        tokens: list[int] = result.token_ids.numpy().tolist()
        start = len(self._response)
        self._versions += [VersionSpan(span.version, start + span.start, start + span.end) for span in result.versions]
        self._response += tokens
        self._log_probs += result.log_probs.numpy().tolist()
        self._mask += [True] * len(tokens)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        turn = Turn(tokens, str(text), result.finish_reason)
        self._turns.append(turn)
        return turn

    def _room(self) -> str:
        return (
            f"data.maxResponseLength is {self._max_response_tokens}, the engine's context {self._max_model_tokens}; "
            f"prompt {len(self.prompt.token_ids)}, response {len(self._response)}"
        )

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise RuntimeError(f"{what}: this episode is over; an agent must end when its call does")
        if self._asking:
            raise RuntimeError(f"{what}: a turn of this episode is under way; await it first")
