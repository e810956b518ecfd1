"""The view of `grpo run` shows a GRPOJob."""

import io
from typing import Any

import pytest
from cli_jobs import NOW, TRAINING, new_job
from rich.console import Console

from grpo_operator.cli.live import event_time, new_events, view_event, view_status
from grpo_worker.local.view import PlainView, render

EVENT: dict[str, Any] = {
    "metadata": {"uid": "e-1", "creationTimestamp": "2026-09-21T14:13:20Z"},
    "type": "Warning",
    "reason": "PodReplaced",
    "message": "arithmetic-rollout-1 ended with 85",
    "lastTimestamp": "2026-09-21T14:13:20Z",
    "count": 1,
}


def shown(job: dict[str, Any], events: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=100, height=60, no_color=True)
    console.print(render(view_status(job), [view_event(event) for event in events], now=NOW))  # type: ignore[arg-type]
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_the_panel_shows_what_the_status_says() -> None:
    text = shown(TRAINING, [EVENT])
    for words in (
        "arithmetic", "Training", "step 12/80", "Step 12: updating the actor", "0.30 / 2", "0.412", "0.530", "1,834", "step 10, 40.0 s ago",
        "ETA 3 min 20 s", "1/2 ready", "v11", "arithmetic-rollout-1 ended with 85",
    ):  # fmt: skip
        assert words in text


def test_what_the_status_does_not_carry_is_absent() -> None:
    document = view_status(TRAINING)
    assert not {"kl", "response_length", "timing_seconds", "staleness"} & document.keys()
    assert view_status(new_job()) == {"name": "arithmetic", "state": "Pending", "members": []}
    assert "Pending" in shown(new_job(), [])


def test_plain_lines_show_a_step() -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    view.update(view_status(TRAINING), [view_event(EVENT)])  # type: ignore[list-item]
    first, second = stream.getvalue().splitlines()
    assert first.endswith("warning: arithmetic-rollout-1 ended with 85")
    assert "step 12/80  epoch 0.30  reward 0.412  accuracy 0.530  1,834 tok/s" in second


def test_an_event_is_shown_again_when_it_happens_again() -> None:
    seen: dict[str, float] = {}
    assert len(new_events([EVENT], seen)) == 1
    assert new_events([EVENT], seen) == []
    assert len(new_events([{**EVENT, "count": 2}], seen)) == 1
    assert len(new_events([{**EVENT, "count": None, "series": {"count": 3}}], seen)) == 1


def test_events_come_in_the_order_of_their_times() -> None:
    later = {**EVENT, "metadata": {"uid": "e-2"}, "lastTimestamp": None, "eventTime": "2026-09-21T14:13:21.500000Z"}
    assert new_events([later, EVENT], {}) == [EVENT, later]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"eventTime": "2026-09-21T14:13:20Z"}, NOW),
        ({"eventTime": "2026-09-21T14:13:10Z", "series": {"lastObservedTime": "2026-09-21T14:13:20Z"}}, NOW),
        ({"firstTimestamp": "2026-09-21T14:13:20Z", "lastTimestamp": None}, NOW),
        ({"metadata": {"creationTimestamp": "2026-09-21T14:13:20Z"}}, NOW),
        ({}, 0.0),
    ],
)
def test_an_event_of_either_api_has_a_time(times: dict[str, Any], expected: float) -> None:
    assert event_time(times) == expected
