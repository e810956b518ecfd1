"""`grpo trace`: the last steps of a run as a timeline, from the run's own spans.

Invariant: a span is drawn where and as long as it was; what overlaps on one track lies on rows below each other, so an empty place is a time
in which nobody worked there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from grpo_worker.errors import DataError, UsageError
from grpo_worker.report.run_data import objects
from grpo_worker.report.style import LIGHT
from grpo_worker.report.write import write_whole
from grpo_worker.run_directory import RunDirectory

WIDTH, LEFT, ROW, GAP, TOP = 1400, 120, 14, 10, 34
TICKS = 8
FIRST = ("step", "trainer-0")  # tracks, from the top; engines follow by name, rewards are last
LAST = "rewards"


@dataclass(frozen=True)
class Span:
    """Something that was done on a track."""

    step: int
    track: str
    name: str
    start: float  # Unix seconds
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return self.start + self.seconds


def write_trace(run_dir: Path, steps: int) -> tuple[Path, Path]:
    """Write `trace.svg` and `trace.json` (Chrome's trace format) of the last steps into the run directory; their paths.

    Raises:
        UsageError: `steps` is not positive. DataError: the run has no spans. ConfigError: the files cannot be written.
    """
    if steps < 1:
        raise UsageError(f"--steps {steps}: must be 1 or more")
    spans = list(read_spans(RunDirectory(run_dir).spans, steps))
    if not spans:
        raise DataError(f"{run_dir}: no finished step to draw. spans.jsonl is written after each step.")
    svg, trace = run_dir / "trace.svg", run_dir / "trace.json"
    write_whole(svg, lambda path: path.write_text(draw(spans), encoding="utf-8"))
    write_whole(trace, lambda path: path.write_text(json.dumps(chrome_trace(spans)), encoding="utf-8"))
    return svg, trace


def read_spans(path: Path, steps: int) -> Iterator[Span]:
    """Of the last steps."""
    lines = [line for line in objects(path, []) if isinstance(line.get("step"), int)] if path.exists() else []
    last = set(sorted({line["step"] for line in lines})[-steps:])
    for line in lines:
        for raw in line.get("spans", ()) if line["step"] in last else ():
            known = {key: raw[key] for key in ("track", "name", "start", "seconds")}
            yield Span(line["step"], **known, facts={key: value for key, value in raw.items() if key not in known})


def tracks(spans: Sequence[Span]) -> dict[str, list[list[Span]]]:
    """Rows of spans that do not overlap, by track, in the order in which they are drawn."""
    found: dict[str, list[list[Span]]] = {}
    for span in sorted(spans, key=lambda span: (span.start, -span.seconds)):
        rows = found.setdefault(span.track, [])
        row = next((row for row in rows if row[-1].end <= span.start), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)

    def place(track: str) -> tuple[int, str]:
        return (FIRST.index(track) if track in FIRST else len(FIRST) + (track == LAST), track)

    return {track: found[track] for track in sorted(found, key=place)}


def draw(spans: Sequence[Span]) -> str:
    """An SVG file; each span says what it is when the pointer rests on it."""
    began, ended = min(span.start for span in spans), max(span.end for span in spans)
    scale = (WIDTH - LEFT - 20) / max(ended - began, 1e-6)
    names = list(dict.fromkeys(span.name for span in sorted(spans, key=lambda span: span.start)))
    parts, top = [], TOP
    for track, rows in tracks(spans).items():
        parts.append(f'<text x="8" y="{top + 11}">{escape(track)}</text>')
        for number, row in enumerate(rows):
            for span in row:
                x, width = LEFT + (span.start - began) * scale, max(span.seconds * scale, 0.6)
                facts = "".join(f", {key} {value}" for key, value in span.facts.items())
                tip = escape(f"{span.name}, step {span.step}: {span.seconds:.3f} s{facts}")
                colour = LIGHT[names.index(span.name) % len(LIGHT)]
                parts.append(
                    f'<rect x="{x:.2f}" y="{top + number * ROW}" width="{width:.2f}" height="{ROW - 2}" fill="{colour}"><title>{tip}</title></rect>'
                )
        top += len(rows) * ROW + GAP
    for tick in range(TICKS + 1):
        x = LEFT + (ended - began) * scale * tick / TICKS
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{top}"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP - 12}">{(ended - began) * tick / TICKS:.2f} s</text>')
    for place, name in enumerate(names):
        x, y = 8 + place % 7 * 195, top + 12 + place // 7 * 18
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{LIGHT[place % len(LIGHT)]}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 9}">{escape(name)}</text>')
    height = top + 24 + len(names) // 7 * 18 + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">'
        "<style>text{font:11px sans-serif;fill:#333}line{stroke:#ccc}</style>"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """Trace Event Format: complete events in microseconds, a process a track and a thread a row."""
    events: list[dict[str, Any]] = []
    for process, (track, rows) in enumerate(tracks(spans).items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": track}})
        for thread, row in enumerate(rows):
            events += [
                {
                    "ph": "X", "name": span.name, "cat": track, "pid": process, "tid": thread, "ts": span.start * 1e6,
                    "dur": span.seconds * 1e6, "args": {"step": span.step, **span.facts},
                }
                for span in row
            ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}
