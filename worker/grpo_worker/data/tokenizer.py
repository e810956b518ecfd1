"""The model's tokenizer, loaded and checked.

Invariant: a `TokenizerInfo` has at least one end-of-sequence id, so a response can end, and a pad id. Padding is never
fed to the model (sequences are packed), so a missing pad token is a note and not an error.
"""

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_worker.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer and what the rest of the job asks of it."""

    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    has_chat_template: bool
    notes: tuple[str, ...] = ()


def load_tokenizer(path: str, revision: str | None = None) -> TokenizerInfo:
    """Load from a directory, or by Hugging Face id from the local cache or the hub. Remote code is never run."""
    local = Path(path).expanduser()
    if local.is_dir():
        source, offline = str(local), True
    else:
        _refuse_missing_path(path, local)
        source, offline = path, _offline_variable() is not None

    from transformers import AutoTokenizer  # seconds to import: files can be read and checked without it

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, local_files_only=offline)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise DataError(_load_message(path, revision, local, error)) from error
    return describe(tokenizer, path, _generation_eos_ids(source, revision, offline))


def describe(
    tokenizer: "PreTrainedTokenizerBase", path: str, generation_eos_ids: tuple[int, ...] = ()
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
        has_chat_template=bool(tokenizer.chat_template),
        notes=tuple(notes),
    )


def _offline_variable() -> str | None:
    on = ("1", "on", "yes", "true")
    return next((name for name in _OFFLINE_VARIABLES if os.environ.get(name, "").lower() in on), None)


def _refuse_missing_path(path: str, local: Path) -> None:
    """What cannot be a Hugging Face id (`name` or `owner/name`) is a path, and must exist."""
    is_id = path.count("/") <= 1 and not path.startswith(("/", ".", "~")) and not path.endswith("/")
    if local.is_file():
        raise DataError(f"model.path: {path} is a file. Name the directory that holds config.json and tokenizer.json.")
    if not is_id:
        raise DataError(f"model.path: {path} does not exist.{_near_directories(local)}")


def _near_directories(local: Path) -> str:
    parent = local.parent
    if not parent.is_dir():
        return f" Nor does its directory {parent}. Check the path, or mount the volume that holds it."
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    near = difflib.get_close_matches(local.name, names, n=3)
    if near:
        return f" Did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f" Directories there: {', '.join(names[:5])}." if names else f" {parent} holds no directory."


def _load_message(path: str, revision: str | None, local: Path, error: Exception) -> str:
    reason = one_line(error)
    if local.is_dir():
        if not any((local / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
            held = sorted(entry.name for entry in local.iterdir())[:6]
            listing = ", ".join(held) if held else "nothing"
            return f"model.path: {path} has no tokenizer (it holds {listing}). Copy tokenizer.json of the model there."
        return f"model.path: the tokenizer in {path} cannot be loaded ({reason}). Copy its files again."
    wanted = f"{path} at revision {revision}" if revision else path
    variable = _offline_variable()
    if variable:
        return (
            f"model.path: {path} is not a directory here, and {wanted} is not in the Hugging Face cache "
            f"({variable} is set, so the hub is not asked).{_near_relative(local)} "
            "Give a directory, or download the model first."
        )
    return (
        f"model.path: {path} is not a directory here, and {wanted} could not be had from the Hugging Face hub: "
        f"it is not reachable, or there is no such model ({reason}).{_near_relative(local)} "
        "Give a directory, check the name and revision, or download the model first."
    )


def _near_relative(local: Path) -> str:
    if not local.parent.is_dir():
        return ""
    names = [entry.name for entry in local.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(local.name, names, n=1)
    return f" Did you mean the directory {local.parent / near[0]}?" if near else ""


def _generation_eos_ids(source: str, revision: str | None, offline: bool) -> tuple[int, ...]:
    """The eos ids of generation_config.json: chat models often end a turn with another token than the tokenizer's."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(source, "generation_config.json", revision=revision, local_files_only=offline)
    except OSError:  # the file is optional, and the tokenizer beside it was found
        return ()
    if found is None:
        return ()
    try:
        config: Any = json.loads(Path(found).read_text(encoding="utf-8"))
        value = config.get("eos_token_id")
        if value is None:
            return ()
        return tuple(int(token) for token in (value if isinstance(value, list) else [value]))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"model.path: {found} is damaged ({error}). Copy it again, or remove it.") from error
