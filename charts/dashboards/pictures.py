"""`python -m charts.dashboards.pictures URL FOLDER`: each panel's queries, as a Prometheus answers them, drawn by matplotlib.

Invariant: what is drawn is what the queries give, with the panels' own titles, order, sizes, units and limits, and the picture says that it is
not Grafana's. A panel without data shows the words that Grafana would show.
"""

import argparse
import json
import re
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts.dashboards.__main__ import DASHBOARDS
from charts.dashboards.panels import COLUMNS, Dashboard, Panel, places
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STEPS = 240  # points of a line
INCHES, FLAT = 0.62, 0.55  # of one of Grafana's columns, and a row beside a column
MAX_LEGENDS = 8
FACTORS = {
    "percentunit": (100.0, "%"),
    "percent": (1.0, "%"),
    "bytes": (1 / 1024**2, "MiB"),
    "s": (1.0, "s"),
    "Bps": (1 / 1024**2, "MiB/s"),
}
BAD = "#c4162a"


@dataclass(frozen=True)
class Server:
    """A Prometheus and the time that is looked at, in Unix seconds."""

    url: str
    start: float
    end: float
    rate_interval: str

    def lines(self, expression: str) -> list[tuple[Mapping[str, str], list[float], list[float]]]:
        """Labels, minutes since the start, and values of each series."""
        step = max((self.end - self.start) / STEPS, 1.0)
        query = re.sub(r"\$(namespace|grpojob)", ".*", expression).replace("$__rate_interval", self.rate_interval)
        given = {"query": query, "start": str(self.start), "end": str(self.end), "step": f"{step:.0f}"}
        with urllib.request.urlopen(
            f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(given)}", timeout=60
        ) as answer:
            series = json.load(answer)["data"]["result"]
        return [
            (
                each["metric"],
                [(float(when) - self.start) / 60 for when, _ in each["values"]],
                [float(value) for _, value in each["values"]],
            )
            for each in series
        ]


def draw(page: Dashboard, server: Server) -> Figure:
    """One picture of a dashboard."""
    placed = list(places(page))
    height = max(top + (item.height if isinstance(item, Panel) else 1) for item, _, top in placed) + 1
    figure = Figure(figsize=(COLUMNS * INCHES, height * INCHES * FLAT), dpi=70)
    FigureCanvasAgg(figure)
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(server.end))
    figure.text(0.005, 1 - 0.35 / height, page.title, fontsize=13, weight="bold", va="center")
    note = f"{(server.end - server.start) / 60:.0f} minutes to {when} UTC, drawn by charts/dashboards/pictures.py from Prometheus' answers; Grafana looks different"
    figure.text(0.995, 1 - 0.35 / height, note, fontsize=7, color="#666", va="center", ha="right")
    for panel, left, top in placed:
        y = 1 - (top + 1) / height
        if isinstance(panel, str):
            figure.text(0.005, y - 0.6 / height, panel, fontsize=10, weight="bold", va="center", color="#1f60c4")
            continue
        room = 0.42 / COLUMNS, 1.0 / height  # for the numbers at the axes, and for the title
        axes = figure.add_axes((
            left / COLUMNS + 2 * room[0], y - panel.height / height + room[1],
            panel.width / COLUMNS - 3.2 * room[0], (panel.height - 1.9) / height,
        ))  # fmt: skip
        _draw_panel(axes, panel, server)
    return figure


def _draw_panel(axes: Axes, panel: Panel, server: Server) -> None:
    factor, unit = FACTORS.get(panel.unit, (1.0, "" if panel.unit == "short" else panel.unit))
    axes.set_title(panel.title + (f" ({unit})" if unit else ""), fontsize=8, loc="left")
    axes.tick_params(labelsize=6)
    lines = [
        (_legend(legend, labels), minutes, [value * factor for value in values])
        for legend, query in panel.queries.items()
        for labels, minutes, values in server.lines(query)
    ]
    if not lines:
        axes.set_axis_off()
        words = textwrap.fill(panel.empty, 6 * panel.width)
        axes.text(0.5, 0.5, words, fontsize=7, ha="center", va="center", color="#666", transform=axes.transAxes)
    elif panel.kind in ("numbers", "table"):
        axes.set_axis_off()
        rows = [
            f"{legend}: {values[-1]:,.4g}" if panel.kind == "table" or len(lines) > 1 else f"{values[-1]:,.4g}"
            for legend, _, values in lines
        ]
        size = 16 if len(rows) == 1 else 7
        axes.text(0.0, 0.5, "\n".join(rows[: 2 * MAX_LEGENDS]), fontsize=size, va="center", transform=axes.transAxes)
    elif panel.kind == "states":
        names = list(dict.fromkeys(legend for legend, _, _ in lines))
        for legend, minutes, _ in lines:
            axes.plot(minutes, [names.index(legend)] * len(minutes), ".", markersize=4)
        axes.set_yticks(range(len(names)), names)
    elif panel.kind == "stacked":
        _stack(axes, lines)
    else:
        for legend, minutes, values in lines:
            axes.plot(minutes, values, linewidth=1.2, label=legend)
    for limit in (panel.warn_above, panel.warn_below):
        if limit is not None and lines and panel.kind == "lines":
            axes.axhline(limit * factor, color=BAD, linewidth=0.8, linestyle="--")
    if lines and panel.kind in ("lines", "stacked"):
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[:MAX_LEGENDS], names[:MAX_LEGENDS], fontsize=5.5, loc="upper left", framealpha=0.6)


def _stack(axes: Axes, lines: list[tuple[str, list[float], list[float]]]) -> None:
    """Series that miss points count as 0 there."""
    times = sorted({minute for _, minutes, _ in lines for minute in minutes})
    rows = [dict(zip(minutes, values, strict=True)) for _, minutes, values in lines]
    stacked = [[row.get(minute, 0.0) for minute in times] for row in rows]
    axes.stackplot(times, stacked, labels=[legend for legend, _, _ in lines], alpha=0.7)


def _legend(pattern: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), pattern)


def write_pictures(server: Server, folder: Path, pages: tuple[Dashboard, ...] = DASHBOARDS) -> list[Path]:
    """One PNG a dashboard."""
    written: list[Path] = []
    for page in pages:
        path = folder / f"{page.uid}.png"
        details: dict[str, Any] = {"Software": None}  # no version in the file: it is committed
        draw(page, server).savefig(path, metadata=details)
        written.append(path)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of a Prometheus")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10, help="how much of the time until now (default: 10)")
    parser.add_argument("--rate-interval", default="1m", help="Grafana's $__rate_interval (default: 1m)")
    options = parser.parse_args()
    now = time.time()
    for picture in write_pictures(
        Server(options.url, now - 60 * options.minutes, now, options.rate_interval), options.folder
    ):
        print(picture)
