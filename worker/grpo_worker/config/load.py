"""From a YAML file to a valid `GRPOJob`, or to every error in it at once.

Invariant: nothing of a document is dropped or guessed: an unknown key, a duplicate key, a string where a number belongs and a
contradiction are each reported with path, value, rule and remedy.
"""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from grpo_worker.config.job import GRPOJob, Spec
from grpo_worker.config.pod_template import CONTAINER_LISTS
from grpo_worker.config.presets import apply_preset
from grpo_worker.config.rules import RULES, Rule
from grpo_worker.config.yaml_text import EXPONENT
from grpo_worker.errors import UsageError


@dataclass(frozen=True)
class Issue:
    """One thing wrong with a document."""

    path: str
    value: Any
    rule: str
    remedy: str

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {_short(self.value)}"
        return f"{self.path}{shown}: {self.rule}. {self.remedy}".rstrip()


class InvalidJob(UsageError):
    """The document has errors; `issues` lists all of them."""

    reason = "InvalidJob"

    def __init__(self, source: str, issues: Sequence[Issue]) -> None:
        self.source, self.issues = source, list(issues)
        count = f"{len(issues)} error" + ("s" if len(issues) != 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {issue}" for issue in issues)]))


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (`1e-6` is one; YAML 1.1 reads it as text) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`: what the mapping says itself wins, so its keys are no duplicates
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key has to be text", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    EXPONENT,
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document. Raises UsageError with line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: not valid YAML: {error}") from error


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> GRPOJob:
    """Read and validate a GRPOJob file.

    Args:
        overrides: `path=value` below `spec` (or starting with `spec.`/`metadata.`); the value is YAML.

    Raises:
        UsageError: no such file, not YAML, a bad override. InvalidJob: errors in the document.
    """
    document = parse_yaml(_text_of(Path(path)), str(path))
    for override in overrides if isinstance(document, dict) else ():
        apply_override(document, override)
    return job_from_document(document, str(path))


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.y*ml")], n=3)
        raise UsageError(f"{file}: no such file." + (f" Did you mean {', '.join(near)}?" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from error


def job_from_document(document: Any, source: str = "GRPOJob", *, rules: Sequence[Rule] = RULES) -> GRPOJob:
    """Validate a parsed document. Raises InvalidJob with every error. `rules`: none for a document that was let in before."""
    if not isinstance(document, Mapping):
        raise InvalidJob(
            source, [Issue("(document)", document, "is not a mapping", "Start from examples/arithmetic.yaml.")]
        )
    raw = {key: value for key, value in document.items() if key != "status"}
    if isinstance(raw.get("spec"), Mapping):
        raw["spec"] = apply_preset(raw["spec"])
    try:
        job = GRPOJob.model_validate(raw)
    except ValidationError as error:
        raise InvalidJob(source, [_issue(detail) for detail in error.errors(include_url=False)]) from None
    broken = [Issue(f"spec.{r.path}", r.shown(job.spec), r.message, r.remedy) for r in rules if r.wrong(job.spec)]
    if broken:
        raise InvalidJob(source, broken)
    return job


def resolved_document(job: GRPOJob) -> dict[str, Any]:
    """The whole document with every default and preset value written out; loads to an equal job."""
    return job.model_dump(by_alias=True, mode="json", exclude_none=True)


def apply_override(document: Any, override: str) -> None:
    """Set one `path=value` in a parsed document. Raises UsageError."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise UsageError(f"--set {override}: expected path=value, for example --set actor.optim.lr=1e-6")
    if keys[0] not in {"spec", "metadata"}:
        keys.insert(0, "spec")
    node = document
    for key in keys[:-1]:
        child = node.get(key) if isinstance(node, dict) else None
        if child is None and isinstance(node, dict):
            child = node[key] = {}
        if not isinstance(child, dict):
            raise UsageError(f"--set {override}: {key} is not a section of the document")
        node = child
    node[keys[-1]] = parse_yaml(text, f"--set {path}")


def written_document(job: GRPOJob) -> dict[str, Any]:
    """The resolved document as files of a run hold it: see `written_spec`."""
    return {**resolved_document(job), "spec": written_spec(job.spec)}


def written_spec(spec: Spec) -> dict[str, Any]:
    """The resolved spec as job.yaml, a ConfigMap and wandb hold it: environment variables by their names alone.

    A value may be a secret, and a process has it in its environment already.
    """
    document = spec.model_dump(by_alias=True, mode="json", exclude_none=True)
    runtime = document["runtime"]
    lists = [runtime["env"]]
    for template in runtime["podTemplate"].values():
        for kind in CONTAINER_LISTS:
            lists += [container.get("env") or [] for container in template["spec"].get(kind) or []]
    for variable in itertools.chain.from_iterable(lists):
        variable.pop("value", None)
    return document


def load_written(path: str | Path) -> GRPOJob:
    """A document that `written_spec` is part of, for a process that has its environment: values are empty. Raises as `load_job`."""
    document = parse_yaml(_text_of(Path(path)), str(path))
    try:
        for variable in document["spec"]["runtime"]["env"]:
            if "valueFrom" not in variable:
                variable["value"] = ""
    except (TypeError, KeyError):
        pass  # a person's document, which may leave anything out or be wrong
    return job_from_document(document, str(path))


_REMEDIES = {
    "missing": "Add it.",
    "bool_type": "Write true or false.",
    "string_type": "Write text; quote it if it looks like a number.",
    "int_type": "Write a whole number without quotes.",
    "int_from_float": "Write a whole number.",
    "float_type": "Write a number without quotes.",
    "list_type": "Write a list.",
    "dict_type": "Write a mapping.",
    "model_type": "Write a mapping of fields.",
}


def _issue(detail: Mapping[str, Any]) -> Issue:
    kind, location = detail["type"], [str(part) for part in detail["loc"]]
    path = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in location).removeprefix(".")
    value = None if isinstance(detail.get("input"), Mapping) or kind == "missing" else detail.get("input")
    if location[:3] == ["spec", "runtime", "env"] and location[-1] == "value":
        value = None  # may be a secret
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=3, cutoff=0.5)
        lower = [key for key in known if key.lower() == location[-1].replace("_", "").lower()]
        hint = f"Did you mean {' or '.join(lower or near)}?" if lower or near else f"Known here: {', '.join(known)}."
        return Issue(path, value, "unknown field", hint)
    message = "input should be a mapping" if kind == "model_type" else str(detail["msg"])
    rule = message[0].lower() + message[1:]
    remedy = f"Expected: {_description(location)}" if kind == "string_pattern_mismatch" else _REMEDIES.get(kind, "")
    return Issue(path, value, rule, remedy)


def _description(location: Sequence[str]) -> str:
    *parents, last = [part for part in location if not part.isdigit()]
    section = _section(parents)
    fields = section.model_fields.values() if section else ()
    return next((info.description or "" for info in fields if info.alias == last), "")


def _known_keys(location: Sequence[str]) -> list[str]:
    section = _section(location)
    return [str(info.alias) for info in section.model_fields.values()] if section else []


def _section(location: Sequence[str]) -> type[BaseModel] | None:
    """The model of the section at this path."""
    model: type[BaseModel] = GRPOJob
    for key in (part for part in location if not part.isdigit()):  # a number is a place in a list of sections
        for info in model.model_fields.values():
            annotation = info.annotation
            section = next((kind for kind in (annotation, *get_args(annotation)) if _is_section(kind)), None)
            if info.alias == key and section is not None:
                model = section
                break
        else:
            return None
    return model


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
