"""The six main curves as a PNG, for chats and pull requests.

Invariant: drawn with matplotlib's Agg canvas and no global state, so it works without a display and in any thread.
"""

from pathlib import Path
from typing import Any

from grpo_worker.report.curves import Chart
from grpo_worker.report.style import LIGHT
from grpo_worker.report.svg import nice_ticks, value_range

PANELS = ("reward", "validation", "response_length", "kl", "entropy", "step_time")
SUBSTITUTES = ("mismatch", "grad_norm", "clip_fraction", "throughput", "staleness")


def write_png(path: Path, title: str, charts: list[Chart]) -> None:
    """Draw 2 x 3 charts; one that the run does not have gives its place to another that it has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {chart.key: chart for chart in charts}
    chosen = [known[key] for key in PANELS if key in known]
    chosen += [known[key] for key in SUBSTITUTES if key in known][: len(PANELS) - len(chosen)]
    figure = Figure(figsize=(13.5, 7.2), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left", parse_math=False)
    axes = figure.subplots(2, 3).flat
    for axis, chart in zip(axes, chosen, strict=False):
        _draw(axis, chart)
    for axis in list(axes)[len(chosen) :]:
        axis.set_axis_off()
    figure.savefig(path, format="png")


def _limits(chart: Chart) -> tuple[float, float]:
    ticks = nice_ticks(*value_range([value for line in chart.series for _, value in line.points], chart.from_zero))
    return ticks[0], ticks[-1]


def _draw(axis: Any, chart: Chart) -> None:
    axis.set_title(chart.title, fontsize=11, loc="left")
    if chart.kind == "stack":
        axis.stackplot(
            [step for step, _ in chart.main],
            [[value for _, value in line.points] for line in chart.series],
            labels=[line.label for line in chart.series],
            colors=[LIGHT[line.color % len(LIGHT)] for line in chart.series],
        )
        axis.set_ylabel("seconds")
    else:
        for line in chart.series:
            label = None if line.faint else line.label.replace("$", r"\$")
            axis.plot(
                [step for step, _ in line.points],
                [value for _, value in line.points],
                color=LIGHT[line.color % len(LIGHT)],
                alpha=0.3 if line.faint else 1.0,
                linewidth=1.0 if line.faint else 2.0,
                marker="o" if line.dots or len(line.points) == 1 else None,
                markersize=4,
                label=label,
            )
        axis.set_ylim(*_limits(chart))
    if chart.kind == "stack":
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    elif len([line for line in chart.series if not line.faint]) > 1:
        axis.legend(fontsize=8, frameon=False)
    axis.set_xlabel("step")
    axis.grid(axis="y", color="#e6e8eb")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#c9ced4")
