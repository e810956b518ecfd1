"""The view of a run: what each line says, on every terminal width, with fields missing."""

import io
import re
import time
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from grpo_worker.local.view import LiveView, PlainView, open_view, render
from grpo_worker.metric_loggers.events import Event

NOW = 1_780_000_000.0
STATUS: dict[str, Any] = {
    "name": "arithmetic",
    "state": "Training",
    "message": "Update: 4 mini-batches",
    "step": 37,
    "total_steps": 100,
    "policy_version": 37,
    "epoch": 1.25,
    "total_epochs": 4,
    "reward": 0.612,
    "accuracy": 0.58,
    "train_accuracy": 0.6,
    "response_length": 34.2,
    "kl": 0.0021,
    "tokens_per_second": 1834.0,
    "timing_seconds": {"gen": 4.2, "reward": 0.1, "old_log_prob": 0.8, "update_actor": 2.4, "step": 8.1},
    "staleness": {"mean": 0.3, "max": 1},
    "checkpoint": {"step": 20, "path": "checkpoints/epoch_0_step_20", "time": NOW - 140},
    "members": [
        {"role": "trainer", "name": "trainer-0", "state": "Ready", "in_service": True, "weight_version": 37},
        {"role": "rollout", "name": "rollout-0", "state": "Syncing", "in_service": False, "weight_version": 36},
    ],
    "eta_seconds": 512.0,
    "started_time": NOW - 400,
    "last_progress_time": NOW - 3,
}


def event(message: str, level: str = "info", seconds: float = NOW) -> Event:
    return Event(time=seconds, role="coordinator", level=level, reason="Test", message=message)


def shown(status: dict[str, Any] | None, events: list[Event], width: int = 100, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(status, events, now=NOW, **options))
    return console.export_text()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "text",
    [
        "arithmetic  Training", "step 37/100", "ETA 8 min 32 s", "1.25 / 4", "0.612", "0.580  +0.370 since start", "34.2 tokens",
        "0.0021", "1,834", "0.30 mean, 1 max", "step 20, 2 min 20 s ago", "rollout-0", "Syncing", "v36", "old_log_prob",
    ],
)  # fmt: skip
def test_the_panel_shows_every_field_of_the_status(text: str) -> None:
    assert text in shown(STATUS, [], first_accuracy=0.21)


@pytest.mark.parametrize("width", [40, 60, 79, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    events = [event("Rollout: generating 1024 prompts x 5 samples = 5120 trajectories " * 3)]
    text = shown(STATUS, events, width, rewards=[i / 500 for i in range(500)], first_accuracy=0.2)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "step 37/100" in text and "rollout-0" in text and "reward" in text


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("height", [15, 24, 30, 50])
def test_a_low_terminal_gets_less_and_never_loses_progress_or_the_newest_event(width: int, height: int) -> None:
    events = [event(f"event number {i}.") for i in range(6)]
    console = Console(file=Terminal(), force_terminal=True, width=width, height=height, record=True)
    console.print(render(STATUS, events, now=NOW, rewards=[0.1, 0.2]))
    text = console.export_text()
    assert len(text.splitlines()) <= height
    assert "step 37/100" in text and "accuracy" in text and "event number 5." in text


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize("field", sorted(STATUS))
@pytest.mark.parametrize("value", ["missing", None])
def test_any_field_may_be_missing_or_null(field: str, value: str | None, width: int) -> None:
    status = {key: known for key, known in STATUS.items() if key != field}
    if value is None:
        status[field] = None
    assert "╰" in shown(status, [event("hello")], width)


@pytest.mark.parametrize(
    "status",
    [
        None,
        {},
        {"state": "Starting"},
        {"state": "Succeeded", "step": 100, "total_steps": 100, "started_time": 1.0, "last_progress_time": 61.0},
        {
            "step": 3,
            "total_steps": 0,
            "reward": float("nan"),
            "timing_seconds": {"gen": 0.0},
            "members": [],
            "staleness": {},
        },
        {"members": [{}, None, {"name": "x"}], "checkpoint": {}, "step": "three"},
    ],
)
def test_partial_and_odd_statuses_do_not_break_the_panel(status: dict[str, Any] | None) -> None:
    text = shown(status, [], 60)
    assert "nan" not in text and "None" not in text


def test_only_the_last_six_events_are_shown() -> None:
    text = shown(STATUS, [event(f"event number {i}.") for i in range(10)])
    assert [f"event number {i}." in text for i in range(10)] == [False] * 4 + [True] * 6


def test_square_brackets_of_a_message_are_text_and_not_markup() -> None:
    assert "[red]data.trainFiles[0]" in shown(STATUS, [event("[red]data.trainFiles[0]: no such file")])


def test_a_coordinator_that_does_not_answer_keeps_the_last_numbers_and_says_so() -> None:
    text = shown(STATUS, [], answering=False)
    assert "no answer from the coordinator" in text and "0.612" in text


def test_the_live_view_draws_the_reward_curve_and_the_change_of_accuracy() -> None:
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=100, height=50, no_color=True)
    view = LiveView(console, clock=lambda: NOW)
    view.update({**STATUS, "step": 0, "reward": None, "accuracy": 0.25}, [])
    for step in range(1, 9):
        view.update({**STATUS, "step": step, "reward": step / 8, "accuracy": 0.2 + step / 20}, [])
    view.update(None, [event("Coordinator is gone", "error")])
    view.close()
    last = terminal.getvalue().rpartition("arithmetic")[2]
    assert "▁▂▃▄▅▆▇█" in last and "+0.350" in last and "Coordinator is gone" in last and "no answer" in last


def test_steps_trained_again_after_a_restart_replace_their_rewards() -> None:
    terminal = Terminal()
    view = LiveView(Console(file=terminal, force_terminal=True, width=100, height=50, no_color=True), clock=lambda: NOW)
    for step, reward in [(1, 0.0), (2, 1.0), (3, 0.0), (4, 0.0), (2, 1.0)]:
        view.update({"step": step, "reward": reward}, [])
    view.close()
    last_frame = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).rpartition("step 2/")[2]
    assert re.findall(r"reward  ([▁-█]+)", last_frame) == ["▁█"]


def test_plain_lines_show_each_event_once_and_one_line_for_each_step() -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    view.update(None, [event("Rollout: generating 8 prompts x 5 samples = 40 trajectories")])
    view.update({**STATUS, "step": 0}, [])
    for step in (1, 1, 2):
        view.update({**STATUS, "step": step}, [event("rollout-0 is slow", "warning")] if step == 2 else [])
    view.close()
    lines = stream.getvalue().splitlines()
    clock = time.strftime("%H:%M:%S", time.localtime(NOW))
    assert lines[0] == f"{clock} Rollout: generating 8 prompts x 5 samples = 40 trajectories"
    expected = "step 1/100  epoch 1.25  reward 0.612  accuracy 0.580  length 34.2  KL 0.0021  1,834 tok/s  8.1 s"
    assert lines[1][9:] == expected
    assert lines[2] == f"{clock} warning: rollout-0 is slow"
    assert lines[3][9:].startswith("step 2/100") and len(lines) == 4


def test_a_reader_that_went_away_does_not_stop_the_run() -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    stream.close()
    view.update(STATUS, [event("unseen")])
    view.update({**STATUS, "step": 38}, [event("unseen")])


@pytest.mark.parametrize(
    ("stream", "environment", "kind"),
    [
        (Terminal(), {"TERM": "xterm-256color"}, LiveView),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": "1"}, LiveView),
        (Terminal(), {"TERM": "xterm-256color", "CI": "false"}, LiveView),
        (Terminal(), {"TERM": "xterm-256color", "CI": "true"}, PlainView),
        (Terminal(), {"TERM": "dumb"}, PlainView),
        (Terminal(), {}, PlainView),
        (io.StringIO(), {"TERM": "xterm-256color"}, PlainView),
    ],
)
def test_the_live_panel_needs_a_terminal_that_can_show_it(
    stream: io.StringIO, environment: dict[str, str], kind: type
) -> None:
    view = open_view(stream, environment)
    view.close()
    assert type(view) is kind


def test_no_color_leaves_out_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    view = open_view(terminal, {"TERM": "xterm-256color", "NO_COLOR": "1"})
    view.update(STATUS, [])
    view.close()
    assert "\x1b[3" not in terminal.getvalue().replace("\x1b[3m", "") and "arithmetic" in terminal.getvalue()


def test_who_looks_in_the_middle_of_a_run_is_told_no_change_since_its_start() -> None:
    terminal = Terminal()
    view = LiveView(Console(file=terminal, force_terminal=True, width=100, height=50, no_color=True), clock=lambda: NOW)
    view.update({**STATUS, "step": 7, "accuracy": 0.5}, [])
    view.update({**STATUS, "step": 8, "accuracy": 0.6}, [])
    view.close()
    assert "since start" not in terminal.getvalue()
