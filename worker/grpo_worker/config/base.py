"""What every section of the document shares: strict types, camelCase names, and fields that carry their own documentation.

Invariant: a field cannot be declared without a description, and a key that no field declares is an error.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

Role = Literal["coordinator", "trainer", "rollout"]

LONGEST_SECONDS = 366 * 24 * 3600  # of any wait or deadline; clocks overflow after some centuries
LARGEST_COUNT = 2**31 - 1  # tokens, prompts, steps: they travel as int32
LARGEST_SEED = 2**32 - 1  # numpy takes no larger one, and vLLM gives it ours

_UPPER = {"kl": "KL", "gpu": "GPU", "kv": "KV", "gib": "GiB", "fsdp": "FSDP", "uid": "UID"}


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
    cluster: bool = False,
    map_key: str | None = None,
    **rules: Any,
) -> Any:
    """A documented field.

    Args:
        default: `...` for a required field.
        doc: one or two sentences for the reference page and `kubectl explain`.
        verl: the parameter's name in verl, when it has one.
        unit: tokens, seconds, prompts, ...
        immutable: False for a field that may change on a running job.
        cluster: True for a field that `grpo run` leaves aside.
        map_key: the field by which entries of a list are told apart when several writers apply it.
        rules: pydantic constraints (ge, gt, le, lt, pattern, min_length, ...); what has a unit is bounded above.
    """
    marks = {"x-verl": verl, "x-unit": unit, "x-mutable": not immutable, "x-cluster": cluster, "x-map-key": map_key}
    extra: dict[str, Any] = {key: value for key, value in marks.items() if value}
    if unit is not None:
        rules.setdefault("le", LONGEST_SECONDS if unit == "seconds" else LARGEST_COUNT)
    if isinstance(default, type) and issubclass(default, BaseModel):
        return Field(default_factory=default, description=doc, json_schema_extra=extra or None, **rules)
    if callable(default):  # a fresh list or mapping for each document; the schema shows its value
        return Field(
            default_factory=default, description=doc, json_schema_extra={**extra, "default": default()}, **rules
        )
    return Field(default, description=doc, json_schema_extra=extra or None, **rules)


# A share of what came before, as an optimizer's moments keep it.
Decay = Annotated[float, Field(ge=0, lt=1)]


# `module:function` or `path/to/file.py:function`.
FunctionPath = Annotated[str, Field(pattern=r"^[\w./\-]+:[A-Za-z_]\w*$")]


def _quantity_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_QUANTITY = r"^[0-9]+(\.[0-9]+)?([eE][0-9]+|m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
# A Kubernetes quantity: `8`, "500m", "64Gi". A whole number may be written without quotes.
Quantity = Annotated[
    str,
    Field(pattern=_QUANTITY),
    BeforeValidator(_quantity_text),
    WithJsonSchema({"type": "string", "pattern": _QUANTITY, "x-kubernetes-int-or-string": True}),
]
