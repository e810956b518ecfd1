"""Dashboards: the files are what the code makes, ask for metrics that exist, explain themselves, and are what Grafana takes."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts.dashboards.__main__ import DASHBOARDS, FOLDER, text
from charts.dashboards.panels import NAME, Dashboard, Panel, build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models
from pydantic import BaseModel

from grpo_worker.catalogue import Entry, document, entries
from grpo_worker.config import Spec

CHARTS = FOLDER.parents[1]
ALERTS = [
    rule
    for file in sorted((CHARTS / "files" / "alerts").iterdir())
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]
CATALOGUE: dict[str, Entry] = {}
for part in document()["processes"]:
    CATALOGUE |= entries(part["process"])
PAGES = [pytest.param(page, id=page.uid) for page in DASHBOARDS]
PANELS = [pytest.param(panel, id=f"{page.uid}: {panel.title}") for page in DASHBOARDS for panel in page.panels]


def base(name: str) -> str:
    return next((name.removesuffix(end) for end in ("_bucket", "_sum", "_count") if name.endswith(end)), name)


@pytest.mark.parametrize("page", PAGES)
def test_the_file_is_what_the_code_makes(page: Dashboard) -> None:
    assert (FOLDER / f"{page.uid}.json").read_text() == text(page), "run: make generated"


def test_the_chart_ships_no_other_file() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {f"{page.uid}.json" for page in DASHBOARDS}


@pytest.mark.parametrize("page", PAGES)
def test_grafanas_own_model_reads_the_file_and_writes_the_same(page: Dashboard) -> None:
    """Round trip through the schema's model: what it does not know would be lost."""
    written = json.loads((FOLDER / f"{page.uid}.json").read_text())
    read = models.Dashboard.from_json(written)
    assert json.loads(JSONEncoder(sort_keys=True).encode(read)) == written


@pytest.mark.parametrize("page", PAGES)
def test_panels_lie_on_the_grid_and_not_on_each_other(page: Dashboard) -> None:
    places: list[Any] = [panel.grid_pos for panel in build(page).panels or []]
    assert len({panel.id_val for panel in build(page).panels or []}) == len(places)
    for place in places:
        assert place.x >= 0 and place.x + place.w <= 24
    for one, other in combinations(places, 2):
        apart = (
            one.x + one.w <= other.x
            or other.x + other.w <= one.x
            or one.y + one.h <= other.y
            or other.y + other.h <= one.y
        )
        assert apart, (one, other)


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_asks_for_metrics_of_the_catalogue_and_explains_itself(panel: Panel) -> None:
    assert panel.metrics
    assert [name for name in panel.metrics if name not in CATALOGUE] == []
    assert panel.meaning.endswith(".") and panel.empty.endswith(".")
    for query in panel.queries.values():
        for name in NAME.findall(query):
            entry = CATALOGUE[base(name)]
            assert (entry.kind == "histogram") == (base(name) != name), (
                f"{name}: a series of a histogram alone has an ending"
            )
            if entry.kind == "counter" and panel.unit != "h" and panel.kind != "numbers":
                assert "rate(" in query or "increase(" in query, f"{name} only grows: ask for its rate"


@pytest.mark.parametrize("panel", PANELS)
def test_a_panels_runbooks_exist(panel: Panel) -> None:
    assert set(panel.alerts) <= {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_metric_is_looked_at_or_for_experts(name: str) -> None:
    shown = {metric for page in DASHBOARDS for panel in page.panels for metric in panel.metrics}
    asked = {base(found) for rule in ALERTS for found in NAME.findall(rule["expr"])}
    assert CATALOGUE[name].experts != (name in shown | asked)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_metrics_of_the_catalogue(rule: dict[str, Any]) -> None:
    found = {base(name) for name in NAME.findall(rule["expr"])}
    assert found and found <= set(CATALOGUE)
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{rule['alert']}.md"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_its_page(rule: dict[str, Any]) -> None:
    page = Path(__file__).parents[2] / rule["annotations"]["runbook_url"]
    lines = page.read_text().splitlines()
    assert lines[0] == f"# {rule['alert']}"
    assert [line for line in lines if line.startswith("## ")] == [
        "## Meaning",
        "## Impact",
        "## Diagnosis",
        "## Mitigation",
    ]


def test_no_page_is_left_over() -> None:
    pages = {page.stem for page in (Path(__file__).parents[2] / "docs" / "runbooks").glob("GRPO*.md")}
    assert pages == {rule["alert"] for rule in ALERTS}


def _fields(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for info in model.model_fields.values():
        yield f"{above}{info.alias}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _fields(info.annotation, f"{above}{info.alias}.")


@pytest.mark.parametrize(
    "page", sorted((Path(__file__).parents[2] / "docs" / "runbooks").glob("*.md")), ids=lambda page: page.stem
)
def test_a_page_names_fields_that_exist(page: Path) -> None:
    """Sections of the document, as in `rollout.maxStaleness: 0`; and what panels say to change."""
    known = set(_fields(Spec))
    sections = "|".join(sorted({field.partition(".")[0] for field in known}))
    found = set(re.findall(rf"`((?:{sections})\.[A-Za-z.]+)", page.read_text()))
    assert sorted(found - known) == []


def test_panels_name_fields_that_exist() -> None:
    known = set(_fields(Spec))
    sections = "|".join(sorted({field.partition(".")[0] for field in known}))
    texts = [
        text for page in DASHBOARDS for panel in page.panels for text in (panel.meaning, panel.normal, panel.empty)
    ]
    found = {name.rstrip(".") for text in texts for name in re.findall(rf"\b((?:{sections})\.[A-Za-z.]+)", text)}
    assert sorted(found - known) == []
