"""Line charts and stacked bars as inline SVG.

Invariant: the result is one <svg> element that needs nothing else than the page's style sheet (classes c0, c1, ... are the palette),
with every text escaped; it holds a bounded number of points however long the run was.
"""

import itertools
import math
from collections.abc import Sequence
from html import escape

from grpo_worker.metric_loggers.formatting import format_number
from grpo_worker.report.curves import Chart, Point, Series

NARROW, WIDE, HEIGHT = 400, 840, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 400
MAX_BARS = 60
MAX_DOTS = 60
MAX_TOOLTIPS = 100


def chart_svg(chart: Chart) -> str:
    """Draw a chart."""
    width = WIDE if chart.kind == "stack" else NARROW
    if chart.kind == "stack":
        body = _bars([_bounded_bars(line) for line in chart.series], chart.digits)
    else:
        body = _lines([bounded_line(line) for line in chart.series], chart)
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(chart.title)} by step">{body}</svg>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that cover `low` to `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def value_range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """From 0 where noise must not look like a trend or where the values come near 0, else from the smallest value."""
    low, high = min(values), max(values)
    if low >= 0 and (from_zero or low <= 0.5 * high):
        return 0.0, high
    if high <= 0 and (from_zero or high >= 0.5 * low):
        return low, 0.0
    if low == high:
        margin = 0.1 * abs(low) or 1.0
        return low - margin, high + margin
    return low, high


class _Frame:
    """Maps steps and values to the chart's area."""

    def __init__(self, width: int, steps: tuple[float, float], ticks: Sequence[float]) -> None:
        self.right = width - RIGHT
        self._x0, self._x1 = steps if steps[1] > steps[0] else (steps[0] - 1, steps[0] + 1)
        self._y0, self._y1 = ticks[0], ticks[-1]

    def x(self, step: float) -> float:
        return LEFT + (step - self._x0) / (self._x1 - self._x0) * (self.right - LEFT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self._y0) / (self._y1 - self._y0) * (HEIGHT - TOP - BOTTOM)


def _lines(series: Sequence[Series], chart: Chart) -> str:
    steps = [step for line in series for step, _ in line.points]
    ticks = nice_ticks(*value_range([value for line in series for _, value in line.points], chart.from_zero))
    # Training starts with step 1 and validation with step 0: from 0 on, all charts share one axis.
    first, last = (0 if min(steps) == 1 else min(steps)), max(steps)
    frame = _Frame(NARROW, (first, last), ticks)
    parts = [_axes(frame, ticks, first, last)]
    for line in series:
        path = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in line.points)
        faint = " faint" if line.faint else ""
        if len(line.points) > 1:
            parts.append(f'<polyline class="line c{line.color}{faint}" points="{path}"/>')
        if (line.dots and len(line.points) <= MAX_DOTS) or len(line.points) == 1:
            parts += [
                f'<circle class="dot c{line.color}" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="3"/>'
                for step, value in line.points
            ]
    parts += [_tooltips(frame, line, chart.digits) for line in series if not line.faint]
    return "".join(parts)


def _bars(series: Sequence[Series], digits: int) -> str:
    steps = [step for step, _ in series[0].points]
    totals = [sum(line.points[i][1] for line in series) for i in range(len(steps))]
    ticks = nice_ticks(0.0, max(totals))
    gap = min((b - a for a, b in itertools.pairwise(steps)), default=1)
    frame = _Frame(WIDE, (steps[0] - gap / 2, steps[-1] + gap / 2), ticks)
    width = max(1.0, (frame.x(gap) - frame.x(0)) * 0.86)
    parts = [_axes(frame, ticks, steps[0], steps[-1])]
    below = [0.0] * len(steps)
    for line in series:
        for i, (step, value) in enumerate(line.points):
            if value > 0:
                top, bottom = frame.y(below[i] + value), frame.y(below[i])
                tip = escape(f"step {step}: {line.label} {format_number(value, digits)} s")
                parts.append(
                    f'<rect class="bar c{line.color}" x="{frame.x(step) - width / 2:.1f}" y="{top:.1f}" '
                    f'width="{width:.1f}" height="{bottom - top:.1f}"><title>{tip}</title></rect>'
                )
            below[i] += value
    return "".join(parts)


def _axes(frame: _Frame, ticks: Sequence[float], first_step: int, last_step: int) -> str:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick_label(tick, ticks)}</text>')
    for tick in nice_ticks(first_step, last_step):
        if first_step <= tick <= last_step and tick == round(tick):
            parts.append(f'<text x="{frame.x(tick):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{tick:,.0f}</text>')
    return "".join(parts)


def _tick_label(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    if tick == 0 and step < 1e-4:
        return "0"
    if max(abs(t) for t in ticks) >= 10_000:
        return f"{tick / 1000:,.{0 if step >= 1000 else 1}f}k"
    if step < 1e-4:
        digits = max(0, math.floor(math.log10(abs(tick)) + 1e-9) - math.floor(math.log10(step) + 1e-9))
        return f"{tick:.{digits}e}".replace("e-0", "e-")
    return f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _tooltips(frame: _Frame, line: Series, digits: int) -> str:
    """Invisible circles whose <title> tells the values: hovering works without a script."""
    every = max(1, math.ceil(len(line.points) / MAX_TOOLTIPS))
    return "".join(
        f'<circle class="tip" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="7">'
        f"<title>{escape(f'step {step}: {line.label} {format_number(value, digits)}')}</title></circle>"
        for step, value in line.points[::every]
    )


def bounded_line(line: Series) -> Series:
    """At most MAX_POINTS points: the lowest and the highest of each share, so that no spike is lost."""
    if len(line.points) <= MAX_POINTS:
        return line
    points: list[Point] = []
    for share in _shares(line.points, MAX_POINTS // 2):
        points += sorted({min(share, key=lambda point: point[1]), max(share, key=lambda point: point[1])})
    return Series(line.label, points, line.color, line.faint, line.dots)


def _bounded_bars(line: Series) -> Series:
    """At most MAX_BARS points, each the mean of its share: bars on top of each other keep their sum."""
    if len(line.points) <= MAX_BARS:
        return line
    points = [
        (share[len(share) // 2][0], sum(value for _, value in share) / len(share))
        for share in _shares(line.points, MAX_BARS)
    ]
    return Series(line.label, points, line.color, line.faint, line.dots)


def _shares(points: Sequence[Point], count: int) -> list[Sequence[Point]]:
    edges = [i * len(points) // count for i in range(count + 1)]
    return [points[a:b] for a, b in itertools.pairwise(edges)]
