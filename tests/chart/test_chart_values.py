"""values.schema.json takes what values.yaml documents and refuses the rest."""

import json
from typing import Any

import pytest
import yaml
from chart_rendering import CHART, Chart, RenderError


def _places(schema: dict[str, Any], values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all objects of values.yaml whose keys the schema lists."""
    if not isinstance(values, dict) or "properties" not in schema:
        return []
    inner = (_places(schema["properties"].get(key, {}), value, (*path, key)) for key, value in values.items())
    return [path, *(place for places in inner for place in places)]


SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
# Other charts share global; resources are Kubernetes' own, claims and all.
OBJECTS = [place for place in _places(SCHEMA, VALUES) if place not in {("global",), ("resources",)}]


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    result: dict[str, Any] = value
    return result


@pytest.mark.parametrize("place", OBJECTS, ids=lambda place: ".".join(place) or "the top")
def test_an_unknown_key_is_refused_at_every_level(chart: Chart, place: tuple[str, ...]) -> None:
    with pytest.raises(RenderError, match="misspelt"):
        chart.text(_nested(place, {"misspelt": True}))


def test_every_value_of_the_schema_is_documented_and_the_other_way_round() -> None:
    for place in OBJECTS:
        schema, values = SCHEMA, VALUES
        for key in place:
            schema, values = schema["properties"][key], values[key]
        assert set(schema["properties"]) == set(values), place


def test_global_values_of_other_charts_are_let_through(chart: Chart) -> None:
    assert chart.render({"global": {"storageClass": "fast"}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("image.pullPolicy", "Sometimes"),
        ("image.tag", 7),
        ("image.tag", "a/b"),
        ("image.repository", ""),
        ("image.digest", "sha256:short"),
        ("worker.image.digest", "latest"),
        ("operator.workers", 0),
        ("operator.workers", "8"),
        ("operator.logFormat", "xml"),
        ("operator.extraArgs", "--flag"),
        ("operator.extraEnv", [{"value": "no name"}]),
        ("rbac.scope", "namespace"),
        ("rbac.namespaces", "team-a"),
        ("rbac.namespaces", ["team-a"]),
        ("crds.enabled", "true"),
        ("networkPolicy.apiServerPorts", []),
        ("networkPolicy.apiServerPorts", [70000]),
        ("metrics.namespaces", ["Not_A_Name"]),
        ("metrics.podMonitor.interval", "30"),
        ("nodeSelector", {"ssd": True}),
        ("commonLabels", {"a": 1}),
        ("tolerations", ["Exists"]),
        ("imagePullSecrets", [{"name": "x"}]),
        ("fullnameOverride", "Upper"),
        ("serviceAccount.create", False),
        ("terminationGracePeriodSeconds", -1),
    ],
)
def test_a_wrong_value_is_refused_and_its_place_named(chart: Chart, path: str, value: Any) -> None:
    with pytest.raises(RenderError) as refused:
        chart.text(_nested(tuple(path.split(".")), value))
    assert path.split(".")[0] in str(refused.value)


def test_namespaces_are_taken_with_namespaced_scope(chart: Chart) -> None:
    assert chart.render({"rbac": {"scope": "namespaced", "namespaces": ["team-a"]}})


def test_the_readme_names_every_value() -> None:
    readme = (CHART / "README.md").read_text()
    for place in OBJECTS:
        schema = SCHEMA
        for key in place:
            schema = schema["properties"][key]
        for key, value in schema["properties"].items():
            if "properties" not in value:
                assert key in readme, ".".join((*place, key))
