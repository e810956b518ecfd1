"""The model's tokenizer, loaded and checked.

Invariant: a `TokenizerInfo` has at least one end-of-sequence id, so a response can end, and a pad id. Padding is never
fed to the model (sequences are packed), so a missing pad token is a note and not an error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_worker.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer and what the rest of the job asks of it."""

    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    notes: tuple[str, ...] = ()


def load_tokenizer(directory: Path) -> TokenizerInfo:
    """Load from a model directory (see `resolve_model`). Remote code is never run."""
    from transformers import AutoTokenizer  # seconds to import: files can be read and checked without it

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
            held = ", ".join(sorted(entry.name for entry in directory.iterdir())[:6]) or "nothing"
            raise DataError(
                f"model.path: {directory} has no tokenizer (it holds {held}). Copy tokenizer.json of the model there."
            ) from error
        raise DataError(
            f"model.path: the tokenizer in {directory} cannot be loaded ({one_line(error)}). Copy its files again."
        ) from error
    return describe(tokenizer, directory, _generation_eos_ids(directory))


def describe(
    tokenizer: "PreTrainedTokenizerBase", path: Path, generation_eos_ids: tuple[int, ...] = ()
) -> TokenizerInfo:
    """Check the special tokens; `generation_eos_ids` are the further ones of generation_config.json."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"model.path: the tokenizer in {path} has no eos token, so no response could end. "
            "Set eos_token in tokenizer_config.json."
        )
    eos_id = int(tokenizer.eos_token_id)
    vocab_size = len(tokenizer)
    unknown = [token for token in generation_eos_ids if not 0 <= token < vocab_size]
    if unknown:
        raise DataError(
            f"model.path: generation_config.json in {path} has eos_token_id {unknown[0]}, but the tokenizer has "
            f"{vocab_size} tokens. Are both files of the same model?"
        )
    notes = []
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = eos_id
        notes.append(f"the tokenizer in {path} has no pad token: {tokenizer.eos_token!r} (eos) is used in its place")
    return TokenizerInfo(
        tokenizer=tokenizer,
        eos_ids=tuple(dict.fromkeys((eos_id, *generation_eos_ids))),
        pad_id=int(pad_id),
        vocab_size=vocab_size,
        notes=tuple(notes),
    )


def stop_token_ids(info: TokenizerInfo, texts: Sequence[str], ids: Sequence[int]) -> list[int]:
    """The tokens that end a response: the end-of-sequence ones, and those of `rollout.stop` and `rollout.stopTokenIds`. Raises DataError.

    A text of several tokens would have to be looked for in text, where a token may begin before it: what is trained would not be what was
    scored.
    """
    found = list(info.eos_ids)
    for position, text in enumerate(texts):
        tokens = info.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise DataError(
                f"rollout.stop[{position}]: {text!r} is {len(tokens)} tokens of this tokenizer, not one. Take a text that is one, or cut "
                "the response in your reward function."
            )
        found += tokens
    for position, token in enumerate(ids):
        if not 0 <= token < info.vocab_size:
            raise DataError(
                f"rollout.stopTokenIds[{position}]: {token} is none of the tokenizer's {info.vocab_size} tokens."
            )
    return list(dict.fromkeys([*found, *ids]))


def _generation_eos_ids(directory: Path) -> tuple[int, ...]:
    """The eos ids of generation_config.json: chat models often end a turn with another token than the tokenizer's."""
    found = directory / "generation_config.json"
    if not found.is_file():
        return ()
    try:
        value: Any = json.loads(found.read_text(encoding="utf-8")).get("eos_token_id")
        if value is None:
            return ()
        return tuple(int(token) for token in (value if isinstance(value, list) else [value]))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"model.path: {found} is damaged ({error}). Copy it again, or remove it.") from error
