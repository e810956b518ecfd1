"""YAML that we write is taken by readers of YAML 1.1 and 1.2 alike."""

from typing import Any

import pytest
import yaml

from grpo_worker.config import parse_yaml
from grpo_worker.config.yaml_text import yaml_text


@pytest.mark.parametrize("word", ["n", "N", "y", "Y", "no", "on", "true", "null", "1e3", "12e45678", "0o17", "12"])
def test_a_word_that_some_reader_takes_for_something_else_is_quoted(word: str) -> None:
    text = yaml_text({word: word})
    assert text in (f"'{word}': '{word}'\n", f'"{word}": "{word}"\n')
    assert parse_yaml(text, "test") == yaml.safe_load(text) == {word: word}


def test_plain_words_stay_plain_and_keys_keep_their_order() -> None:
    assert yaml_text({"name": "node", "a": ["yes-man"]}) == "name: node\na:\n- yes-man\n"


def test_a_value_that_comes_twice_is_written_twice() -> None:
    shared: dict[str, Any] = {"a": 1}
    assert yaml_text({"x": shared, "y2": shared}) == "x:\n  a: 1\ny2:\n  a: 1\n"
