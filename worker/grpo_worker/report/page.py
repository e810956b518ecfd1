"""The report as one HTML page.

Invariant: the page loads nothing (its content security policy forbids even trying) and runs no script; every text that comes from the
run, a model's responses above all, passes through `escape`.
"""

import time
from collections.abc import Sequence
from html import escape

from grpo_worker import __version__
from grpo_worker.metric_loggers.formatting import format_number
from grpo_worker.report.curves import ALL_TITLES, Chart
from grpo_worker.report.run_data import RunData, Sample, SamplePair
from grpo_worker.report.style import style_sheet
from grpo_worker.report.summary import Summary
from grpo_worker.report.svg import chart_svg

MAX_EVENTS = 200
LONG_TEXT_CHARACTERS = 600


def render_page(run: RunData, summary: Summary, charts: Sequence[Chart], refresh_seconds: int | None = None) -> str:
    """The whole document. `refresh_seconds`: the browser loads it again after so long."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    made_by = "watch, live," if refresh_seconds else "report"
    sections = [_head(summary), _problems(run.problems), _charts(charts), _samples(run), _events(summary), _job(run)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"{refresh}<title>{escape(summary.headline)}</title><style>{style_sheet()}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Made by grpo {made_by} {escape(__version__)} from {escape(run.run_dir.resolve().name)}/ on "
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}.</footer>\n</main></body></html>\n"
    )


def _head(summary: Summary) -> str:
    if summary.first is None or summary.last is None:
        hero = '<span class="measure">No accuracy or reward was logged</span>'
    else:
        change = summary.last - summary.first
        direction = "up" if change > 0 else "down" if change < 0 else "info"
        hero = (
            f'<span class="measure">{escape(summary.measure)}</span>'
            f'<span class="big">{format_number(summary.first)} → {format_number(summary.last)}</span>'
            f'<span class="pill {direction}">{change:+.3f}</span>'
        )
    tiles = "".join(
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="remark">{escape(remark)}</div></div>'
        for label, value, remark in summary.tiles
    )
    return f'<h1>GRPO run · {escape(summary.name)}</h1><div class="hero">{hero}</div><div class="tiles">{tiles}</div>'


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    return '<div class="problems">' + "<br>".join(escape(problem) for problem in problems) + "</div>"


def _charts(charts: Sequence[Chart]) -> str:
    missing = [title for title in ALL_TITLES if title not in {chart.title for chart in charts}]
    note = f'<p class="note">Not logged in this run: {escape(", ".join(missing))}.</p>' if missing else ""
    return "<h2>Curves</h2>" + f'<div class="charts">{"".join(_card(chart) for chart in charts)}</div>' + note


def _card(chart: Chart) -> str:
    first, last = chart.main[0][1], chart.main[-1][1]
    if chart.kind == "stack":
        first, last = (sum(line.points[i][1] for line in chart.series) for i in (0, -1))
    unit = " s" if chart.kind == "stack" else ""
    ends = f"{format_number(first, chart.digits)} → <b>{format_number(last, chart.digits)}</b>{unit}"
    note = chart.note + (f" Bold: mean over {chart.smoothed_over} steps." if chart.smoothed_over else "")
    shown = [line for line in chart.series if not line.faint]
    legend = "".join(
        f'<span><i class="key c{line.color}"></i>{escape(line.label)}</span>' for line in shown if len(shown) > 1
    )
    return (
        f'<section class="card{" wide" if chart.kind == "stack" else ""}"><header><h3>{escape(chart.title)}</h3>'
        f'<span class="ends">{ends}</span></header><p class="note">{escape(note)}</p>{chart_svg(chart)}'
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + "</section>"
    )


def _samples(run: RunData) -> str:
    if not run.samples:
        return ""
    rows = "".join(_sample_row(pair) for pair in run.samples)
    before = _step_label("Before", [pair.before.step for pair in run.samples])
    after = _step_label("After", [pair.after.step for pair in run.samples if pair.after])
    return (
        f'<h2>Sample completions</h2><p class="note">The first {len(run.samples)} {run.sample_kind} prompts that were kept, '
        "in the order of the file; not chosen by score.</p>"
        f'<div class="panel samples"><table><thead><tr><th>Prompt</th><th>Ground truth</th><th>{before}</th><th>{after}</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _step_label(word: str, steps: Sequence[int]) -> str:
    return f"{word} (step {steps[0]})" if len(set(steps)) == 1 else word


def _sample_row(pair: SamplePair) -> str:
    after = _completion(pair.after) if pair.after else '<span class="note">not sampled again</span>'
    return (
        f'<tr><td class="text">{_long(pair.before.prompt)}</td>'
        f'<td class="text truth">{_long(pair.before.ground_truth)}</td>'
        f'<td class="text">{_completion(pair.before)}</td><td class="text">{after}</td></tr>'
    )


def _completion(sample: Sample) -> str:
    value = sample.accuracy if sample.accuracy is not None else sample.score
    if value is None:
        mark, kind = "not scored", "info"
    elif value > 0:
        mark, kind = "✓", "up"
    else:
        mark, kind = "✗", "down"
    score = "" if sample.score is None else f" score {format_number(sample.score, 2)}"
    response = _long(sample.response) if sample.response else '<span class="note">(empty)</span>'
    return f'<div class="score"><span class="pill {kind}">{mark}{score}</span></div>{response}'


def _long(text: str) -> str:
    if len(text) <= LONG_TEXT_CHARACTERS:
        return escape(text)
    return (
        f"{escape(text[:LONG_TEXT_CHARACTERS])}…<details><summary>all {len(text):,} characters</summary>"
        f"{escape(text)}</details>"
    )


def _events(summary: Summary) -> str:
    if not summary.notable:
        return ""
    left_out = len(summary.notable) - MAX_EVENTS
    rows = "".join(
        f'<tr><td class="time">{_moment(event["time"])}</td><td>{escape(event["role"])}</td>'
        f'<td><span class="pill {_level_class(event["level"])}">{escape(event["reason"] or event["level"])}</span></td>'
        f"<td>{escape(event['message'])}</td></tr>"
        for event in summary.notable[-MAX_EVENTS:]
    )
    note = (
        f'<p class="note">The last {MAX_EVENTS}; {left_out} older ones are in events.jsonl.</p>' if left_out > 0 else ""
    )
    return (
        f'<h2>Restarts and warnings</h2>{note}<div class="panel"><table><thead><tr><th>Time</th><th>Role</th>'
        f"<th>Reason</th><th>Message</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _level_class(level: str) -> str:
    return level if level in {"warning", "error"} else "info"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds > 0 else ""


def _job(run: RunData) -> str:
    if not run.job_text:
        return ""
    return (
        '<h2>Job</h2><div class="panel"><details><summary>job.yaml, with every default and preset value resolved'
        f"</summary><pre>{escape(run.job_text)}</pre></details></div>"
    )
