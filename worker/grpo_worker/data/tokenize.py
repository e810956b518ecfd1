"""From a prompt to token ids, once: rollout and trainer see these ids and nothing is ever tokenised again.

Invariant: an `EncodedPrompt` has at least one and at most `max_prompt_tokens` tokens. A prompt that cannot be made so
is dropped (filtered as over-long) or is a DataError that names its row.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import xxhash

from grpo_worker.config.data import Apply, Truncation
from grpo_worker.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model gets it; `text` is what the ids say, also after truncation."""

    token_ids: list[int]
    text: str
    truncated: bool = False


def truncate(token_ids: list[int], limit: int, side: Truncation) -> list[int]:
    """At most `limit` tokens: `left` and `right` name the side that is cut off, `middle` keeps both ends."""
    if len(token_ids) <= limit:
        return token_ids
    if side == "left":
        return token_ids[-limit:]
    if side == "right":
        return token_ids[:limit]
    if side == "middle":
        head = limit // 2
        return token_ids[:head] + token_ids[len(token_ids) - (limit - head) :]
    raise ValueError(f"{len(token_ids)} tokens are over {limit}, and truncation is {side}")


@dataclass(frozen=True)
class PromptEncoder:
    """Applies the chat template, tokenises, and holds each prompt to the limit.

    With `chat_template="auto"` and a tokenizer that has a template, a text prompt becomes one user message. Without a
    template the text is taken as it is, and messages are joined by blank lines. `filter_overlong` drops over-long
    prompts before `truncation` is asked, as in verl.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_prompt_tokens: int
    truncation: Truncation = "error"
    filter_overlong: bool = True
    chat_template: Apply = "auto"
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 1:
            raise UsageError(f"data.maxPromptLength: {self.max_prompt_tokens} is less than 1 token. Use 1 or more.")
        if self.truncation not in get_args(Truncation):
            allowed = ", ".join(get_args(Truncation))
            raise UsageError(f"data.truncation: {self.truncation!r} is not one of {allowed}.")
        if self.chat_template not in get_args(Apply):
            raise UsageError(f"data.chatTemplate.apply: {self.chat_template!r} is not one of auto, never.")

    @property
    def uses_template(self) -> bool:
        return self.chat_template == "auto" and bool(self.tokenizer.chat_template)

    def identity(self) -> str:
        """A name that changes with whatever changes what a prompt becomes."""
        tokenizer = self.tokenizer
        settings = [
            self.max_prompt_tokens, self.truncation, self.filter_overlong, self.uses_template, self.system_prompt, dict(self.template_kwargs),
            tokenizer.chat_template, tokenizer.bos_token_id, type(tokenizer).__name__,
        ]  # fmt: skip
        vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
        return xxhash.xxh3_128_hexdigest(f"{json.dumps(settings, default=str)} {vocabulary}".encode())

    def encode(self, prompt: Any, where: str) -> EncodedPrompt | None:
        """One prompt (text, or a list of {role, content}); None when it is filtered as over-long."""
        return self.encode_batch([prompt], lambda _: where)[0]

    def encode_batch(self, prompts: Sequence[Any], where: Callable[[int], str]) -> list[EncodedPrompt | None]:
        """Many prompts at once; `where(i)` names prompt i in a message, such as `train.parquet row 7`."""
        texts = [self._render(prompt, where, position) for position, prompt in enumerate(prompts)]
        if not texts:
            return []
        encoded = self._token_ids(texts)
        return [self._limit(ids, texts[position], where, position) for position, ids in enumerate(encoded)]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # A template writes its own special tokens; plain text gets what the tokenizer adds (a BOS token, or nothing).
        add_special_tokens = not self.uses_template
        if self.tokenizer.is_fast:
            # Without the character offsets that the wrapper asks for: the same ids in two thirds of the time.
            backend = self.tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [self._with_one_bos(encoding.ids) for encoding in encodings]
        encoded = self.tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )
        return [self._with_one_bos(list(token_ids)) for token_ids in encoded["input_ids"]]

    def _with_one_bos(self, token_ids: list[int]) -> list[int]:
        """A text that begins with the BOS token gets no second one from the tokenizer."""
        bos = self.tokenizer.bos_token_id
        return token_ids[1:] if bos is not None and token_ids[:2] == [bos, bos] else token_ids

    def _limit(
        self, token_ids: list[int], text: str, where: Callable[[int], str], position: int
    ) -> EncodedPrompt | None:
        limit = self.max_prompt_tokens
        if not token_ids:
            raise DataError(f"{where(position)}: the tokenizer makes no token of the prompt {text[:40]!r}. Remove it.")
        if len(token_ids) <= limit:
            return EncodedPrompt(token_ids, text)
        if self.filter_overlong:
            return None
        if self.truncation == "error":
            raise DataError(
                f"{where(position)}: the prompt has {len(token_ids)} tokens, over data.maxPromptLength = {limit}. "
                f"Raise data.maxPromptLength, set data.filterOverlongPrompts: true to drop such rows, "
                f"or data.truncation to left, right or middle."
            )
        kept = truncate(token_ids, limit, self.truncation)
        return EncodedPrompt(kept, str(self.tokenizer.decode(kept)), truncated=True)

    def _render(self, prompt: Any, where: Callable[[int], str], position: int) -> str:
        messages = _messages(prompt, where, position)
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if not self.uses_template:
            return "\n\n".join(message["content"] for message in messages)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self.template_kwargs
                )
            )
        except Exception as error:  # templates are programs of the model's author: they raise what they like
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{where(position)}: the chat template refuses the prompt (roles: {roles}): {error}. "
                "Change the messages or data.chatTemplate, or set data.chatTemplate.apply: never."
            ) from error


def _messages(prompt: Any, where: Callable[[int], str], position: int) -> list[dict[str, Any]]:
    """The prompt as non-empty messages, each with text content."""
    if prompt is None:
        raise DataError(f"{where(position)}: the prompt is null. Fill it in, or remove the row.")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{where(position)}: the prompt is empty. Fill it in, or remove the row.")
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, np.ndarray):  # as pandas gives lists
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        kind = type(prompt).__name__
        raise DataError(f"{where(position)}: the prompt is a {kind}, not text or a list of {{role, content}} messages.")
    if not prompt:
        raise DataError(f"{where(position)}: the prompt is an empty list of messages. Fill it in, or remove the row.")
    messages = []
    for number, message in enumerate(prompt):
        if not isinstance(message, Mapping):
            raise DataError(f"{where(position)}: message {number} of the prompt is not a {{role, content}} pair.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{where(position)}: message {number} of the prompt has no text in {key!r}.")
        # Parquet gives every message of a struct column all fields: those it does not use are null.
        messages.append({key: value for key, value in message.items() if value is not None})
    if not any(message["content"].strip() for message in messages):
        raise DataError(f"{where(position)}: all messages of the prompt are empty. Fill them in, or remove the row.")
    return messages
