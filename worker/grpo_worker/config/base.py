"""What every section of the document shares: strict types, camelCase names, and fields that carry their own documentation.

Invariant: a field cannot be declared without a description, and a key that no field declares is an error.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

_UPPER = {"kl": "KL", "gpu": "GPU", "kv": "KV", "gib": "GiB", "fsdp": "FSDP"}


def camel(name: str) -> str:
    """`ppo_max_token_len_per_gpu` -> `ppoMaxTokenLenPerGPU` (acronyms as verl and Kubernetes users write them)."""
    first, *rest = name.split("_")
    return first + "".join(_UPPER.get(part, part.capitalize()) for part in rest)


class Section(BaseModel):
    """A part of the document. Immutable; unknown keys are refused; no silent conversion between types."""

    model_config = ConfigDict(
        alias_generator=camel,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=False,
        use_attribute_docstrings=False,
    )


def field(
    default: Any = ...,
    doc: str = "",
    *,
    verl: str | None = None,
    unit: str | None = None,
    immutable: bool = True,
    **rules: Any,
) -> Any:
    """A documented field.

    Args:
        default: `...` for a required field.
        doc: one or two sentences for the reference page and `kubectl explain`.
        verl: the parameter's name in verl, when it has one.
        unit: tokens, seconds, prompts, ...
        immutable: False for a field that may change on a running job.
        rules: pydantic constraints (ge, gt, le, lt, pattern, min_length, ...).
    """
    extra: dict[str, Any] = {"x-verl": verl, "x-unit": unit, "x-mutable": None if immutable else True}
    extra = {key: value for key, value in extra.items() if value is not None}
    if isinstance(default, type) and issubclass(default, BaseModel):
        return Field(default_factory=default, description=doc, json_schema_extra=extra or None, **rules)
    if callable(default):  # a fresh list or mapping for each document; the schema shows its value
        return Field(
            default_factory=default, description=doc, json_schema_extra={**extra, "default": default()}, **rules
        )
    return Field(default, description=doc, json_schema_extra=extra or None, **rules)


# `module:function` or `path/to/file.py:function`.
FunctionPath = Annotated[str, Field(pattern=r"^[\w./\-]+:[A-Za-z_]\w*$")]
