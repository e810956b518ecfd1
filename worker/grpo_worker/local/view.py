"""What a person sees of a run: a live panel on a terminal, plain lines anywhere else.

Invariant: a view only shows what `/status` and events.jsonl say; every field may be missing (a process is starting, is gone, or is of
another version), and then the panel shows a dash and the plain lines leave it out.
"""

import io
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_worker.errors import one_line
from grpo_worker.metric_loggers.events import Event
from grpo_worker.metric_loggers.formatting import DASH, format_duration, format_number, sparkline, step_line
from grpo_worker.metric_loggers.names import STEP_PARTS, finite

LAST_EVENTS = 6
REFRESHES_PER_SECOND = 4
NARROW_COLUMNS = 80
_STATE_STYLES = {"Succeeded": "bold green", "Failed": "bold red", "Stopping": "bold yellow", "Starting": "bold yellow"}
# What each layout shows: blank lines, reward curve, members, step time, events. The first that fits is taken.
_LAYOUTS = (
    (True, True, True, True, LAST_EVENTS),
    (False, True, True, True, LAST_EVENTS),
    (False, True, True, True, 3),
    (False, True, False, True, 3),
    (False, False, False, False, 3),
    (False, False, False, False, 1),
)
_LEVEL_STYLES = {"warning": "yellow", "error": "bold red"}

Status = Mapping[str, Any]


class View(Protocol):
    """Shows a run until it is closed."""

    def update(self, status: Status | None, events: Sequence[Event]) -> None:
        """Show the newest status (None: the coordinator does not answer) and the events that are new since the last call."""

    def close(self) -> None:
        """Leave the terminal as it was; the last state stays readable."""


def open_view(stream: TextIO, environment: Mapping[str, str] | None = None) -> View:
    """The live panel on a terminal that can show it, else plain lines (a pipe, TERM=dumb, a CI machine).

    NO_COLOR keeps the panel and leaves out its colours.
    """
    environment = os.environ if environment is None else environment
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # an ASCII terminal gets "?" for a bar, not an exception
    plain = (
        not stream.isatty()
        or environment.get("TERM", "") in {"", "dumb", "unknown"}
        or environment.get("CI", "") not in {"", "0", "false"}
    )
    if plain:
        return PlainView(stream)
    return LiveView(Console(file=stream, no_color=bool(environment.get("NO_COLOR"))))


class PlainView:
    """Each event once as `HH:MM:SS message`, and one compact line for each finished step."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self._step = 0

    def update(self, status: Status | None, events: Sequence[Event]) -> None:
        for event in events:
            prefix = "" if event["level"] == "info" else f"{event['level']}: "
            self._print(f"{_clock(event['time'])} {prefix}{event['message']}")
        step = _integer(status, "step")
        if status is not None and step is not None and step != self._step:
            self._step = step
            if step > 0:
                self._print(f"{_clock(time.time())} {_status_line(step, status)}")

    def close(self) -> None:
        return None

    def _print(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):
            self._stream = None  # the reader is gone (`grpo run | head`): the run goes on unseen


class LiveView:
    """A panel that is redrawn in place."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._status: Status | None = None
        self._answering = False
        self._events: deque[Event] = deque(maxlen=LAST_EVENTS)
        self._rewards: dict[int, float] = {}
        self._first_accuracy: float | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_SECOND)
        self._live.start()

    def update(self, status: Status | None, events: Sequence[Event]) -> None:
        self._events.extend(events)
        self._answering = status is not None
        if status is not None:
            self._status = status
            self._remember(status)

    def close(self) -> None:
        self._live.stop()

    def _remember(self, status: Status) -> None:
        step, reward = _integer(status, "step"), _number(status, "reward")
        if step is not None and reward is not None:
            # After a restart from a checkpoint, later steps are trained again.
            self._rewards = {known: value for known, value in self._rewards.items() if known < step} | {step: reward}
        if self._first_accuracy is None and step == 0:  # later, the accuracy at the start is not known any more
            self._first_accuracy = _number(status, "accuracy")

    def _render(self) -> RenderableType:
        return render(
            self._status,
            list(self._events),
            rewards=list(self._rewards.values()),
            first_accuracy=self._first_accuracy,
            now=self._clock(),
            answering=self._answering,
        )


def render(
    status: Status | None,
    events: Sequence[Event],
    *,
    rewards: Sequence[float] = (),
    first_accuracy: float | None = None,
    now: float,
    answering: bool = True,
) -> RenderableType:
    """The panel as a pure function of what is known; fits any width from 40 columns on."""
    return _RunPanel(status or {}, list(events)[-LAST_EVENTS:], list(rewards), first_accuracy, now, answering)


class _RunPanel:
    """Lays the panel out for the width that rich gives it."""

    def __init__(
        self,
        status: Status,
        events: list[Event],
        rewards: list[float],
        first_accuracy: float | None,
        now: float,
        answering: bool,
    ) -> None:
        self._status = status
        self._events = events
        self._rewards = rewards
        self._first_accuracy = first_accuracy
        self._now = now
        self._answering = answering

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The fullest layout that fits the terminal's height: what has gone wrong (events) stays longest."""
        for spaced, curve, members, timing, events in _LAYOUTS:
            panel = Panel(
                self._body(options.max_width, spaced, curve, members, timing, events),
                title=self._title(), title_align="left", box=box.ROUNDED, border_style="dim",
            )  # fmt: skip
            if not console.is_terminal or len(console.render_lines(panel, options)) <= console.height:
                break
        yield panel

    def _body(self, width: int, spaced: bool, curve: bool, members: bool, timing: bool, events: int) -> Group:
        sections: list[list[RenderableType]] = [[self._progress()], [self._numbers()]]
        if timing and width >= NARROW_COLUMNS:
            both = Table.grid(expand=True, padding=(0, 2))
            both.add_column(ratio=1)
            both.add_column(ratio=1)
            both.add_row(self._numbers(), self._timing(20))
            sections[1] = [both]
        elif timing:
            sections.append([self._timing(12)])
        if curve and self._rewards:
            line = Text(no_wrap=True, overflow="crop")
            line.append("reward  ", style="dim")
            line.append(sparkline(self._rewards, max(8, width - 14)), style="cyan")
            sections.append([line])
        if members and (table := self._members(width)):
            sections.append([table])
        if self._events:
            sections.append([self._event(event) for event in self._events[-events:]])
        parts = sections[0]
        for section in sections[1:]:
            parts += [Text(), *section] if spaced else section
        return Group(*parts)

    def _title(self) -> Text:
        state = str(self._status.get("state") or "Starting")
        title = Text(no_wrap=True, overflow="ellipsis")
        title.append(str(self._status.get("name") or "grpo"), style="bold")
        title.append("  ")
        title.append(state, style=_STATE_STYLES.get(state, "bold cyan"))
        if self._status and not self._answering:
            title.append("  (no answer from the coordinator)", style="yellow")
        return title

    def _progress(self) -> RenderableType:
        step, total = _integer(self._status, "step"), _integer(self._status, "total_steps")
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            f"step {DASH if step is None else step}/{total or DASH}",
            ProgressBar(total=max(1, total or 1), completed=min(step or 0, total or 0)),
            self._remaining(),
        )
        rows: list[RenderableType] = [head]
        if message := self._status.get("message"):
            rows.append(Text(str(message), style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*rows)

    def _remaining(self) -> str:
        if self._status.get("state") in {"Succeeded", "Failed"}:
            started, last = _number(self._status, "started_time"), _number(self._status, "last_progress_time")
            return format_duration(last - started) if started is not None and last is not None else ""
        return f"ETA {format_duration(_number(self._status, 'eta_seconds'))}"

    def _numbers(self) -> Table:
        status = self._status
        epoch, epochs = _number(status, "epoch"), _number(status, "total_epochs")
        length = _number(status, "response_length")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True, min_width=10)
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_row("epoch", (DASH if epoch is None else f"{epoch:.2f}") + (f" / {epochs:g}" if epochs else ""))
        table.add_row("reward", format_number(_number(status, "reward")))
        table.add_row("accuracy", self._accuracy())
        if (train := _number(status, "train_accuracy")) is not None:
            table.add_row("  on train", format_number(train))
        table.add_row("response", DASH if length is None else f"{length:,.1f} tokens")
        table.add_row("KL", format_number(_number(status, "kl"), 4))
        table.add_row("tokens/s", format_number(_number(status, "tokens_per_second"), 1))
        table.add_row("staleness", self._staleness())
        table.add_row("checkpoint", self._checkpoint())
        return table

    def _accuracy(self) -> Text:
        accuracy = _number(self._status, "accuracy")
        text = Text(format_number(accuracy))
        if accuracy is not None and self._first_accuracy is not None:
            change = accuracy - self._first_accuracy
            text.append(f"  {change:+.3f}", style="green" if change > 0 else "red" if change < 0 else "dim")
            text.append(" since start", style="dim")
        return text

    def _staleness(self) -> str:
        staleness = _mapping(self._status, "staleness")
        mean, largest = _number(staleness, "mean"), _number(staleness, "max")
        if mean is None and largest is None:
            return DASH
        return f"{format_number(mean, 2)} mean, {DASH if largest is None else f'{largest:g}'} max"

    def _checkpoint(self) -> str:
        checkpoint = _mapping(self._status, "checkpoint")
        if (step := _integer(checkpoint, "step")) is None:
            return "none yet"
        saved = _number(checkpoint, "time")
        return f"step {step}" + ("" if saved is None else f", {format_duration(self._now - saved)} ago")

    def _timing(self, bar_width: int) -> Table:
        seconds = _mapping(self._status, "timing_seconds")
        total = _number(seconds, "step")
        known = {name: value for name in seconds if name != "step" and (value := _number(seconds, name))}
        order = [name for name in STEP_PARTS if name in known] + sorted(set(known) - set(STEP_PARTS))
        longest = max(known.values(), default=0.0)
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True)
        table.add_row("step time", format_duration(total), "")
        for name in order:
            bar = "█" * max(1, round(known[name] / longest * bar_width))
            table.add_row(name, format_duration(known[name]), Text(bar, style="cyan"))
        return table

    def _members(self, width: int) -> Table | None:
        members = self._status.get("members")
        if not isinstance(members, Sequence) or isinstance(members, str) or not members:
            return None
        table = Table(box=None, expand=True, padding=(0, 1), pad_edge=False, header_style="dim")
        columns = ("member", "state", "weights", "in service") if width >= 60 else ("member", "state", "w", "serves")
        for column in columns:
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for member in members:
            if not isinstance(member, Mapping):
                continue
            version, serving = _integer(member, "weight_version"), member.get("in_service")
            table.add_row(
                str(member.get("name") or member.get("role") or DASH),
                str(member.get("state") or DASH),
                DASH if version is None else f"v{version}",
                DASH if serving is None else Text("yes", style="green") if serving else Text("no", style="yellow"),
            )
        return table

    @staticmethod
    def _event(event: Event) -> Text:
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{_clock(event['time'])} ", style="dim")
        line.append(one_line(event["message"]), _LEVEL_STYLES.get(event["level"], ""))
        return line


def _status_line(step: int, status: Status) -> str:
    accuracy = _number(status, "accuracy")
    return step_line(
        step,
        total_steps=_integer(status, "total_steps"),
        epoch=_number(status, "epoch"),
        reward=_number(status, "reward"),
        accuracy=accuracy if accuracy is not None else _number(status, "train_accuracy"),
        response_length=_number(status, "response_length"),
        kl=_number(status, "kl"),
        tokens_per_second=_number(status, "tokens_per_second"),
        step_seconds=_number(_mapping(status, "timing_seconds"), "step"),
    )


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _number(mapping: Mapping[str, Any] | None, key: str) -> float | None:
    return finite(mapping.get(key)) if mapping is not None else None


def _integer(mapping: Mapping[str, Any] | None, key: str) -> int | None:
    value = _number(mapping, key)
    return None if value is None else int(value)


def _mapping(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}
