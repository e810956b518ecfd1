"""The CRD is structural and says what the models say; the generated files are those of the models."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_worker.config import Spec
from grpo_worker.config.crd import crd, crd_yaml
from grpo_worker.config.presets import PRESET_PATHS
from grpo_worker.config.reference import reference_markdown
from grpo_worker.config.rules import RULES

ROOT = Path(__file__).parents[2]
SCHEMA: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
SPEC: dict[str, Any] = SCHEMA["properties"]["spec"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a schema with its path; `[]` for the items of a list, `{}` for the values of a mapping."""
    yield path, schema
    for key, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{key}".lstrip("."))
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


# What the API server has to see of a PodSpec, and of engine arguments, is not a field of ours; `false` is what an unquoted `n` arrives as.
NODES = [
    (path, node)
    for path, node in nodes(SPEC)
    if not re.match(r"runtime\.podTemplate\.\w+\.spec\.|rollout\.engineArgs\.", path) and not path.endswith(".false")
]
FIELDS = [(path, node) for path, node in NODES if path and not path.endswith(("[]", "{}"))]
STATUS_NODES = list(nodes(SCHEMA["properties"]["status"]))


@pytest.mark.parametrize(
    ("path", "node"),
    NODES + STATUS_NODES,
    ids=[path or "spec" for path, _ in NODES] + [f"status {p}" for p, _ in STATUS_NODES],
)
def test_a_node_is_structural(path: str, node: dict[str, Any]) -> None:
    assert not {"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title"} & node.keys()
    if node.get("x-kubernetes-int-or-string"):
        return
    assert node.get("type") in {"object", "array", "string", "integer", "number", "boolean"}
    if node["type"] == "object":
        assert (
            "properties" in node or "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
        )
    if node["type"] == "array":
        assert "items" in node
        assert set(node.get("x-kubernetes-list-map-keys", ())) <= set(node["items"].get("required", ()))
    assert all(not key.startswith("x-") or key.startswith("x-kubernetes-") for key in node)


@pytest.mark.parametrize(("path", "node"), FIELDS, ids=[path for path, _ in FIELDS])
def test_a_field_is_described(path: str, node: dict[str, Any]) -> None:
    assert node["description"].endswith((".", "!")), node["description"]


def test_a_field_of_the_status_is_described() -> None:
    fields = [(path, node) for path, node in STATUS_NODES if path and not path.endswith("[]")]
    assert [path for path, node in fields if not node.get("description", "").endswith(".")] == []
    assert len(fields) > 60


def test_a_description_carries_unit_default_and_the_name_in_verl() -> None:
    described = {path: node["description"] for path, node in FIELDS}
    assert described["rollout.n"] == "Samples a prompt. Unit: samples. Default: 5. In verl: rollout.n."
    assert described["actor.clipRatioHigh"].endswith(
        "Default: 0.2, unless a preset sets it. In verl: actor.clip_ratio_high."
    )
    assert described["suspend"].endswith("May change on a running job.")


def accepts(node: dict[str, Any], value: Any) -> bool:
    """Whether the bounds of a structural node admit the value (defaults are filled in where the value leaves them out)."""
    kind = node.get("type", "string")  # a quantity
    types: dict[str, Any] = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}  # fmt: skip
    if not isinstance(value, types[kind]) or (kind in {"integer", "number"} and isinstance(value, bool)):
        return False
    if kind in {"integer", "number"}:
        low, high = node.get("minimum"), node.get("maximum")
        above = low is None or (value > low if node.get("exclusiveMinimum") else value >= low)
        below = high is None or (value < high if node.get("exclusiveMaximum") else value <= high)
        return above and below
    if kind == "array":
        fits = node.get("minItems", 0) <= len(value) <= node.get("maxItems", len(value))
        return fits and all(accepts(node["items"], item) for item in value)
    if kind == "object":
        missing = set(node.get("required", ())) - value.keys()
        return not missing and all(accepts(node["properties"][key], item) for key, item in value.items())
    if kind == "string":
        return value in node.get("enum", [value]) and len(value) >= node.get("minLength", 0)
    return True


DEFAULTED = [(path, node) for path, node in FIELDS if "default" in node]


@pytest.mark.parametrize(("path", "node"), DEFAULTED, ids=[path for path, _ in DEFAULTED])
def test_a_default_is_within_its_own_bounds(path: str, node: dict[str, Any]) -> None:
    assert accepts(node, node["default"])


def test_fields_that_a_preset_may_set_have_no_default() -> None:
    described = dict(FIELDS)
    assert all("default" not in described[path] for path in PRESET_PATHS)


def test_every_other_default_of_the_models_is_in_the_schema() -> None:
    described = dict(FIELDS)
    document = Spec.model_validate({"model": {"path": "m"}}).model_dump(by_alias=True, mode="json", exclude_none=True)

    def values(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            here = f"{path}.{key}".lstrip(".")
            if "properties" in described[here]:
                yield from values(value, here)
            else:
                yield here, value

    expected = {path: value for path, value in values(document) if path not in PRESET_PATHS and path != "model.path"}
    assert {path: described[path].get("default") for path in expected} == expected


def test_a_section_that_is_left_out_gets_its_defaults() -> None:
    """But for `model`, which has a required field, and for sections that are off while they are absent."""
    sections = [
        path for path, node in FIELDS if "properties" in node and "[]" not in path and node.get("default") != {}
    ]
    off = ["runtime.workspace", "network.rdma"]
    by_role = [
        f"runtime.{kind}.{role}"
        for kind in ("resources", "podTemplate")
        for role in ("coordinator", "trainer", "rollout")
    ]
    patches = [f"runtime.podTemplate.{role}.metadata" for role in ("all", "coordinator", "trainer", "rollout")]
    assert set(sections) == {"model", *off, *by_role, *patches, "runtime.podTemplate.all"}
    assert SPEC["required"] == ["model"]


def test_each_contradiction_is_a_rule_of_the_api_server() -> None:
    validations = [rule for rule in SPEC["x-kubernetes-validations"] if "oldSelf" not in rule["rule"]]
    assert [validation["rule"] for validation in validations] == [rule.cel for rule in RULES if rule.cel]
    assert all(validation["fieldPath"].lstrip(".") in dict(FIELDS) for validation in validations)
    assert all(validation["message"] and "\n" not in validation["message"] for validation in validations)


def test_a_rule_asks_whether_a_field_without_default_is_there() -> None:
    """CEL fails on a field that is absent; so `self.a.b` without `has(self.a.b)` must be a field that has a default."""
    described = dict(FIELDS)
    for rule in RULES:
        asked = set(re.findall(r"has\(self\.([\w.]+)\)", rule.cel))
        read = {re.sub(r"\.(all|exists|exists_one)$", "", path) for path in re.findall(r"self\.([\w.]+)", rule.cel)}
        bare = {path for path in read - asked if "default" not in described[path]}
        assert not bare, f"{rule.path}: {bare}"


def test_each_field_is_held_fast_or_says_that_it_may_change() -> None:
    def held(node: dict[str, Any]) -> set[str]:
        return {
            rule["fieldPath"].lstrip(".")
            for rule in node.get("x-kubernetes-validations", ())
            if "oldSelf" in rule["rule"]
        }

    def loose(node: dict[str, Any], path: str = "") -> Iterator[str]:
        for key, child in node["properties"].items():
            here = f"{path}.{key}".lstrip(".")
            if key in held(node) or key == "false":
                continue
            if "properties" in child:
                yield from loose(child, here)
            else:
                yield here

    may_change = {path for path, node in FIELDS if node["description"].endswith("May change on a running job.")}
    assert set(loose(SPEC)) == may_change
    assert may_change == {
        "suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished",
        "rollout.replicas", "rollout.minReplicas", "rollout.maxReplicas",
    }  # fmt: skip


def test_the_names_are_those_that_kubectl_users_type() -> None:
    names = crd()["spec"]["names"]
    assert (names["kind"], names["shortNames"], names["categories"]) == ("GRPOJob", ["grpo"], ["all"])
    assert crd()["metadata"]["name"] == f"{names['plural']}.{crd()['spec']['group']}" == "grpojobs.grpo.dev"


def test_the_yaml_is_the_document() -> None:
    assert yaml.safe_load(crd_yaml()) == crd()


def test_the_crd_file_is_generated_from_the_models() -> None:
    assert (ROOT / "crds" / "grpojobs.grpo.dev.yaml").read_text() == crd_yaml(), "run: make generated"


def test_the_reference_page_is_generated_from_the_models() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference_markdown(), "run: make generated"


def test_the_reference_page_has_a_row_for_each_field() -> None:
    section, documented, cells = "", [], set()
    for line in reference_markdown().splitlines():
        if heading := re.match(r"#+ spec\.?(\S*)$", line):
            section = heading[1]
        elif row := re.match(r"\| `(\w+)`", line):
            documented.append(f"{section}.{row[1]}".lstrip("."))
            cells.add(line.count("|") - line.count("\\|"))
    opened = "x-kubernetes-preserve-unknown-fields"
    assert sorted(documented) == sorted(path for path, node in FIELDS if "properties" not in node or opened in node)
    assert cells == {8}
