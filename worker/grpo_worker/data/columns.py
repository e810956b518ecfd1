"""Which values of a row are its prompt and its ground truth, and whether the types of a file's columns can be those.

Invariant: `Keys` name values that are there: of a table by its schema, before a row is read; of rows that are dictionaries by the first of
them. Everything wrong with a schema is reported at once.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from grpo_worker.data.options import DataOptions
from grpo_worker.errors import DataError

# Names under which other data sets and trainers keep the same thing.
KNOWN_ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "problem", "query", "instruction", "input", "messages"),
    "response": ("completion", "output"),
    "reward": ("ground_truth", "answer", "solution", "label", "target"),
}
VERL_GROUND_TRUTH = "reward_model.ground_truth"

Path = tuple[str, ...]  # a column, and fields of structs below it


@dataclass(frozen=True)
class Keys:
    """Where the values of a row are. `reward_type` is Arrow's, of a table's column."""

    prompt: Path
    reward: Path
    response: Path
    reward_type: pa.DataType | None = None

    def prompt_of(self, row: Mapping[str, Any]) -> Any:
        return _value(row, self.prompt)

    def reward_of(self, row: Mapping[str, Any]) -> Any:
        value = _value(row, self.reward)
        return value if self.reward_type is None else _as_stored(value, self.reward_type)

    def others_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the reward function gets beside the ground truth. A struct such as verl's reward_model stays: its other fields are its business."""
        taken = {path[0] for path in (self.prompt, self.reward, self.response) if len(path) == 1}
        return {name: value for name, value in row.items() if name not in taken}


def keys_of_table(schema: pa.Schema, options: DataOptions, label: str, name: str) -> Keys:
    """Raises DataError with a line for each column that is missing or of a type that cannot be used."""
    twice = [column for column, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise DataError(f"{label}: {name} has two columns named {twice[0]!r}. Rename or drop one.")

    def check(role: str, key: str, path: Path) -> str:
        arrow_type = _type_at(schema, path)
        wanted = _not_a_prompt(arrow_type) if role == "prompt" else _not_a_ground_truth(arrow_type)
        return wanted and (
            f"{label}: column {key!r} of {name} has type {arrow_type}, not {wanted}. "
            f"Write it as text, or set data.{role}Key to another column."
        )

    keys = _keys({field.name: _shape(field.type) for field in schema}, options, f"{label}: {name}", "columns", check)
    return replace(keys, reward_type=_type_at(schema, keys.reward))


def keys_of_rows(row: Mapping[str, Any], options: DataOptions, where: str) -> Keys:
    """Of rows that are dictionaries, by one of them, which `where` names. Raises DataError."""
    return _keys(row, options, where, "keys", lambda role, key, path: "")


def _keys(
    row: Mapping[str, Any], options: DataOptions, where: str, noun: str, check: Callable[[str, str, Path], str]
) -> Keys:
    """
    Args:
        row: the names, structs as mappings below theirs.
        noun: what `row` has: columns or keys.
        check: what is wrong with the role, key and path that were found; empty for nothing.
    """
    names, problems = [str(name) for name in row], []

    def find(role: str, key: str) -> Path:
        path = _path(row, key)
        if problem := check(role, key, path) if path else _missing(names, role, key, where, noun):
            problems.append(problem)
        return path or ()

    prompt, reward = find("prompt", options.prompt_key), find("reward", _reward_key(row, options))
    # Training reads no response, so it may be absent and of any type, unless it was asked for or only its case is wrong.
    response = options.response_key
    expected = response != DataOptions.response_key or any(name.lower() == response.lower() for name in names)
    if expected and response not in names:
        problems.append(_missing(names, "response", response, where, noun))
    if problems:
        raise DataError("\n".join(problems))
    return Keys(prompt, reward, (response,))


def _reward_key(row: Mapping[str, Any], options: DataOptions) -> str:
    """verl's struct is known by its name where no other key was asked for."""
    key = options.reward_key
    untouched = key == DataOptions.reward_key and key not in row
    return VERL_GROUND_TRUTH if untouched and _path(row, VERL_GROUND_TRUTH) else key


def _path(row: Mapping[str, Any], key: str) -> Path | None:
    """A name with dots comes before what it would be a path to."""
    if key in row:
        return (key,)
    path = tuple(key.split("."))
    below: Any = row
    for part in path:
        if not isinstance(below, Mapping) or part not in below:
            return None
        below = below[part]
    return path


def _shape(arrow_type: pa.DataType) -> Any:
    """Structs as mappings of their fields."""
    return {field.name: _shape(field.type) for field in arrow_type} if pa.types.is_struct(arrow_type) else arrow_type


def _type_at(schema: pa.Schema, path: Path) -> pa.DataType:
    arrow_type = schema.field(path[0]).type
    for name in path[1:]:
        arrow_type = arrow_type.field(name).type
    return arrow_type


def _value(row: Mapping[str, Any], path: Path) -> Any:
    """None where a struct on the way is null. Raises KeyError."""
    value: Any = row
    for part in path:
        if value is None:
            return None
        value = value[part]
    return value


def _as_stored(value: Any, arrow_type: pa.DataType) -> Any:
    """With single and half precision as such: Python has one kind of float, in which a stored 0.1 is 0.10000000149011612."""
    types = pa.types
    if value is None:
        return None
    if types.is_float32(arrow_type):
        return np.float32(value)
    if types.is_float16(arrow_type):
        return np.float16(value)
    if types.is_struct(arrow_type):
        return {field.name: _as_stored(value[field.name], field.type) for field in arrow_type}
    if _is_list(arrow_type):
        return [_as_stored(each, arrow_type.value_type) for each in value]
    return value


def _missing(names: Sequence[str], role: str, key: str, where: str, noun: str) -> str:
    head = f"{where} has no {'column ' if noun == 'columns' else ''}{key!r} ({noun}: {', '.join(names)})."
    setting = f"data.{role}Key"
    wrong_case = [name for name in names if name.lower() == key.lower()]
    if wrong_case:
        return f"{head} {wrong_case[0]!r} differs only in case: rename it, or set {setting}: {wrong_case[0]}."
    if {"question", "answer"} <= set(names) and role in ("prompt", "reward"):
        return f"{head} It looks like raw GSM8K: convert it with `grpo data gsm8k`, or set {setting}."
    near = difflib.get_close_matches(key, names, n=1) or [name for name in names if name in KNOWN_ALIASES[role]]
    if near:
        return f"{head} Is it {near[0]!r}? Rename it, or set {setting}: {near[0]}."
    return f"{head} Rename it, or set {setting}."


def _is_text(arrow_type: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(arrow_type):
        return _is_text(arrow_type.value_type)
    return bool(types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type))


def _is_list(arrow_type: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type))


def _not_a_prompt(arrow_type: pa.DataType) -> str:
    """What it should be; empty for text and messages."""
    if _is_text(arrow_type):
        return ""
    if _is_list(arrow_type) and pa.types.is_struct(message := arrow_type.value_type):
        fields = [message.get_field_index(name) for name in ("role", "content")]
        if all(field >= 0 and _is_text(message.field(field).type) for field in fields):
            return ""
    return "text or a list of {role, content} messages"


def _not_a_ground_truth(arrow_type: pa.DataType) -> str:
    """What it should be; empty for text, numbers, truth values, and lists and structs of those."""
    types = pa.types
    if _is_list(arrow_type):
        return _not_a_ground_truth(arrow_type.value_type)
    if types.is_struct(arrow_type):
        return next((wrong for field in arrow_type if (wrong := _not_a_ground_truth(field.type))), "")
    if types.is_integer(arrow_type) or types.is_floating(arrow_type) or types.is_decimal(arrow_type):
        return ""
    return (
        ""
        if _is_text(arrow_type) or types.is_boolean(arrow_type)
        else "text, a number, a truth value, or lists or structs of those"
    )
