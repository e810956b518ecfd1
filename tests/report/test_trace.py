"""The timeline of the last steps: spans where they were, rows that do not overlap, and files that others read."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from grpo_worker.coordinator.spans import MAX_SPANS, Spans
from grpo_worker.coordinator.timing import Timer
from grpo_worker.errors import DataError, UsageError
from grpo_worker.report.trace import Span, chrome_trace, draw, read_spans, tracks, write_trace

SVG = "{http://www.w3.org/2000/svg}"


def span(track: str, name: str, start: float, seconds: float, step: int = 1, **facts: Any) -> Span:
    return Span(step, track, name, 1000 + start, seconds, facts)


SPANS = [
    span("step", "gen", 0, 4),
    span("rewards", "score", 2, 1, prompt="e0-f0-r1"),
    span("rewards", "score", 2.5, 1.5, prompt="<b>&"),
    span("rewards", "score", 3, 0.5),
    span("rollout-1", "generate", 0, 3.5, prompts=8),
    span("rollout-0", "generate", 0, 4, prompts=8),
    span("trainer-0", "update", 4, 6),
    span("step", "update_actor", 4, 6),
]


def test_rows_of_a_track_do_not_overlap_and_lose_nothing() -> None:
    found = tracks(SPANS)
    assert list(found) == ["step", "trainer-0", "rollout-0", "rollout-1", "rewards"]
    assert [len(rows) for rows in found.values()] == [1, 1, 1, 1, 2]
    assert sorted(s.start for rows in found.values() for row in rows for s in row) == sorted(s.start for s in SPANS)
    for rows in found.values():
        for row in rows:
            assert all(one.end <= other.start for one, other in pairwise(row))


def test_the_picture_has_each_span_as_long_as_it_was() -> None:
    picture = ElementTree.fromstring(draw(SPANS))
    drawn = {title.text: rect for rect in picture.iter(f"{SVG}rect") for title in rect.iter(f"{SVG}title")}
    assert len(drawn) == len(SPANS)
    update, generate = drawn["update, step 1: 6.000 s"], drawn["gen, step 1: 4.000 s"]
    assert float(update.attrib["width"]) / float(generate.attrib["width"]) == pytest.approx(6 / 4, rel=0.01)
    assert float(update.attrib["x"]) == pytest.approx(
        float(generate.attrib["x"]) + float(generate.attrib["width"]), abs=0.1
    )
    assert any("<b>&" in (text or "") for text in drawn), "what a run wrote is text"


def test_perfetto_gets_microseconds_and_names() -> None:
    events = chrome_trace(SPANS)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(names.values()) == {"step", "trainer-0", "rollout-0", "rollout-1", "rewards"}
    (update,) = (event for event in events if event["name"] == "update")
    assert (update["ph"], update["ts"], update["dur"], names[update["pid"]]) == ("X", 1004e6, 6e6, "trainer-0")
    assert update["args"]["step"] == 1


def lines(path: Path, *steps: int) -> None:
    with path.open("a") as file:
        for number in steps:
            spans = [{"track": "step", "name": "gen", "start": float(number), "seconds": 1.0, "tokens": 7}]
            file.write(json.dumps({"step": number, "spans": spans}) + "\n")


def test_the_last_steps_are_read_and_a_torn_line_is_none(tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl"
    lines(file, 1, 2, 3)
    lines(file, 4, 4)  # a validation at the end comes on a line of its own
    with file.open("a") as torn:
        torn.write('{"step": 5, "sp')
    assert [(s.step, s.facts) for s in read_spans(file, 2)] == [(3, {"tokens": 7})] + [(4, {"tokens": 7})] * 2


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    lines(tmp_path / "spans.jsonl", 1, 2)
    svg, trace = write_trace(tmp_path, 3)
    ElementTree.parse(svg)
    assert len(json.loads(trace.read_text())["traceEvents"]) == 3


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished step to draw"):
        write_trace(tmp_path, 3)
    with pytest.raises(UsageError, match="--steps 0"):
        write_trace(tmp_path, 0)


def test_spans_end_with_their_block_and_are_taken_once() -> None:
    spans = Spans()
    with pytest.raises(ZeroDivisionError), spans.of("trainer-0", "update"), spans.of("rollout-0", "weights", version=3):
        raise ZeroDivisionError
    first, second = spans.take()
    assert (first["track"], first["name"], first["version"]) == ("rollout-0", "weights", 3)
    assert second["start"] <= first["start"] and second["seconds"] >= first["seconds"]
    assert spans.take() == []


def test_what_nobody_takes_is_bounded() -> None:
    spans = Spans()
    for number in range(MAX_SPANS + 5):
        with spans.of("rewards", "score", prompt=number):
            pass
    kept = spans.take()
    assert (len(kept), kept[-1]["prompt"]) == (MAX_SPANS, MAX_SPANS + 4)


def test_the_parts_of_a_timer_are_spans() -> None:
    spans = Spans()
    timer = Timer(spans=spans)
    with timer.part("gen"):
        pass
    assert [(s["track"], s["name"]) for s in spans.take()] == [("step", "gen")]
    assert set(timer.seconds) == {"gen"}
