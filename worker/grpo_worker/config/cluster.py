"""Which fields of a document only a cluster uses.

Invariant: a field that `grpo run` leaves aside is marked where it is declared (`field(..., cluster=True)`), nowhere else.
"""

from collections.abc import Iterator

from pydantic import BaseModel

from grpo_worker.config.job import Spec


def cluster_only_fields(spec: Spec) -> list[str]:
    """Paths below spec of the fields that the document sets and `grpo run` leaves aside, e.g. `runtime.workspace`."""
    return list(_set_fields(spec, ""))


def _set_fields(section: BaseModel, path: str) -> Iterator[str]:
    for name, info in type(section).model_fields.items():
        value, here = getattr(section, name), f"{path}.{info.alias}".lstrip(".")
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        if extra.get("x-cluster"):
            if value != info.get_default(call_default_factory=True, validated_data={}):
                yield here
        elif isinstance(value, BaseModel):
            yield from _set_fields(value, here)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _set_fields(item, f"{here}[{index}]")
