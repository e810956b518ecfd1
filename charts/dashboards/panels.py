"""What a dashboard is made of, and how that becomes Grafana's JSON.

Invariant: a panel says what its numbers mean, what is normal, why it may be empty, and which metrics it shows. Judgement by colour only where a
threshold is true for every job.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from string import ascii_uppercase
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

JOB = 'namespace=~"$namespace", grpojob=~"$grpojob"'
OF_JOB = "{{namespace}}/{{grpojob}}"
RUNBOOKS = "docs/runbooks/"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS = 24
NAME = re.compile(r"\b(?:grpo_(?:coordinator|trainer|rollout|operator|job)_[a-z0-9_]+|vllm:[a-z_]+|process_[a-z_]+)\b")


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        queries: PromQL by legend. unit: Grafana's. empty: why there may be no data. kind: lines, stacked, numbers, states or table.
        warn_above, warn_below: where the number is bad for everybody. alerts: whose runbooks say what to do.
    """

    title: str
    meaning: str
    normal: str
    queries: Mapping[str, str]
    unit: str = "short"
    empty: str = "The job has made no step yet, or its pods are not scraped."
    kind: str = "lines"
    width: int = 8
    height: int = 7
    warn_above: float | None = None
    warn_below: float | None = None
    alerts: Sequence[str] = ()

    @property
    def judged(self) -> bool:
        """Whether colours say what is bad."""
        return self.warn_above is not None or self.warn_below is not None

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that it asks for, in order."""
        found = [name for query in self.queries.values() for name in NAME.findall(query)]
        return list(dict.fromkeys(re.sub(r"_(bucket|sum|count)$", "", name) for name in found))


tile = partial(Panel, kind="numbers", width=6, height=4)  # a number at the top of a page


@dataclass(frozen=True)
class Dashboard:
    """`questions`: what a person asks, in order, and the panels that answer."""

    uid: str
    title: str
    description: str
    questions: Mapping[str, Sequence[Panel]]
    jobs: str = ""  # the metric that knows namespaces and jobs to choose from; without it there is no choice
    refresh: str = "30s"

    @property
    def panels(self) -> list[Panel]:
        return [panel for panels in self.questions.values() for panel in panels]


def quantiles(metric: str, labels: str = "") -> dict[str, str]:
    """Median and 99th percentile of a histogram."""
    rate = f"sum by (le) (rate({metric}_bucket{{{labels}}}[$__rate_interval]))"
    return {f"p{number}": f"histogram_quantile(0.{number}, {rate})" for number in (50, 99)}


def build(page: Dashboard) -> models.Dashboard:
    """Grafana's model of it."""
    numbers = count(1)
    board = (
        dashboard.Dashboard(page.title)
        .uid(page.uid)
        .description(page.description)
        .tags(["grpo"])
        .editable()
        .refresh(page.refresh)
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("GRPO")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["grpo"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    if page.jobs:
        in_namespace = f'{page.jobs}{{namespace=~"$namespace"}}'
        board = board.with_variable(_variable("namespace", "Namespace", page.jobs))
        board = board.with_variable(_variable("grpojob", "Job", in_namespace))
    for item, left, top in places(page):
        if isinstance(item, Panel):
            place = models.GridPos(x=left, y=top, w=item.width, h=item.height)
            board = board.with_panel(_panel(item).id(next(numbers)).grid_pos(place))
        else:
            place = models.GridPos(x=left, y=top, w=COLUMNS, h=1)
            board = board.with_row(dashboard.Row(item).id(next(numbers)).grid_pos(place))
    return board.build()


def places(page: Dashboard) -> Iterator[tuple[Panel | str, int, int]]:
    """Questions (each a row of height 1) and panels in order, with the column and row of their upper left corner."""
    top = 0
    for question, panels in page.questions.items():
        yield question, 0, top
        top, left, line = top + 1, 0, 0
        for panel in panels:
            if left + panel.width > COLUMNS:
                top, left, line = top + line, 0, 0
            yield panel, left, top
            left, line = left + panel.width, max(line, panel.height)
        top += line


def _variable(name: str, label: str, series: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(f"label_values({series}, {name})")
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _panel(panel: Panel) -> Any:
    kinds: dict[str, Callable[[Panel], Any]] = {
        "lines": _lines,
        "stacked": _stacked,
        "numbers": _numbers,
        "states": _states,
        "table": _table,
    }
    metrics = ", ".join(f"`{name}`" for name in panel.metrics)
    links = [
        dashboard.DashboardLink(f"Runbook: {alert}")
        .type(models.DashboardLinkType.LINK)
        .url(f"{RUNBOOKS}{alert}.md")
        .target_blank(True)
        for alert in panel.alerts
    ]
    made = (
        kinds[panel.kind](panel)
        .title(panel.title)
        .description(f"{panel.meaning} {panel.normal}\n\nMetric: {metrics}")
        .datasource(SOURCE)
        .unit(panel.unit)
        .no_value(panel.empty)
        .links(links)
    )
    if panel.judged:
        made = made.thresholds(_thresholds(panel))
    for ref_id, (legend, query) in zip(ascii_uppercase, panel.queries.items(), strict=False):
        target = prometheus.Dataquery().expr(query).legend_format(legend).datasource(SOURCE)
        if panel.kind == "table":
            target = target.format(prometheus_models.PromQueryFormat.TABLE).instant()
        made = made.with_target(target.ref_id(ref_id))
    return made


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig:
    good, bad = "green", "red"
    limit = panel.warn_above if panel.warn_above is not None else panel.warn_below
    first, second = (good, bad) if panel.warn_above is not None else (bad, good)
    steps = [models.Threshold(value=None, color=first), models.Threshold(value=limit, color=second)]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _lines(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel().line_width(2).fill_opacity(0).show_points(common_models.VisibilityMode.AUTO).span_nulls(True)
    )
    if panel.judged:
        made = made.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
        )
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST).show_legend(True)
    return made.legend(legend.placement(common_models.LegendPlacement.BOTTOM))


def _stacked(panel: Panel) -> timeseries.Panel:
    stacking = common.StackingConfig().mode(common_models.StackingMode.NORMAL)
    return _lines(panel).fill_opacity(60).line_width(0).stacking(stacking)


def _numbers(panel: Panel) -> stat.Panel:
    mode = common_models.BigValueColorMode.VALUE if panel.judged else common_models.BigValueColorMode.NONE
    return stat.Panel().color_mode(mode).graph_mode(common_models.BigValueGraphMode.AREA)


def _states(panel: Panel) -> statetimeline.Panel:
    return statetimeline.Panel().show_value(common_models.VisibilityMode.NEVER)


def _table(panel: Panel) -> table.Panel:
    """A row for each job: the queries are columns, by their legends."""
    renamed = {f"Value #{ref_id}": legend for ref_id, legend in zip(ascii_uppercase, panel.queries, strict=False)}
    scraped = ("Time", "__name__", "instance", "job", "pod", "service", "endpoint", "container")
    hidden = dict.fromkeys(scraped, True)
    return (
        table.Panel()
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            models.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden, "renameByName": renamed})
        )
    )
