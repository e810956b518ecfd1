"""Tiny real tokenizers built in code, and small real Parquet files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<a>{{ suffix | default('') }}{% endif %}"
)

WriteParquet = Callable[..., Path]


def character_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """One token a character, so that a prompt's length in tokens is its length in characters."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: number for number, token in enumerate(["[UNK]", *characters])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Split("", "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return character_tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer(eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def write_parquet(tmp_path: Path) -> WriteParquet:
    """Writes columns (or rows prompt-0.., reward 0..) to a file in the test's directory."""

    def write(
        columns: dict[str, Any] | int = 10, name: str = "train.parquet", row_group_rows: int = 4, tag: str = "p"
    ) -> Path:
        if isinstance(columns, int):
            numbers = range(columns)
            columns = {
                "prompt": [f"{tag}{number}" for number in numbers],
                "response": ["" for _ in numbers],
                "reward": [str(number) for number in numbers],
            }
        path = tmp_path / name
        pq.write_table(pa.table(columns), path, row_group_size=row_group_rows)
        return path

    return write
