"""The report's first lines: how far the run came, and with what.

Invariant: every number says where it comes from; without a validation the headline says so and does not borrow another number's name.
"""

from dataclasses import dataclass

from grpo_worker.metric_loggers import names
from grpo_worker.metric_loggers.events import Event
from grpo_worker.metric_loggers.formatting import format_duration, format_number
from grpo_worker.report.curves import accuracy_points, points_of
from grpo_worker.report.run_data import RunData


@dataclass(frozen=True, slots=True)
class Summary:
    """`tiles` are (label, value, remark)."""

    name: str
    measure: str
    first: float | None
    last: float | None
    headline: str
    tiles: list[tuple[str, str, str]]
    notable: list[Event]


def summarize(run: RunData) -> Summary:
    """Reduce a run to its headline, tiles and notable events."""
    name = str(run.job_value("metadata.name") or run.run_dir.resolve().name)
    measure, points = _measure(run)
    first = points[0][1] if points else None
    last = points[-1][1] if points else None
    steps = run.metrics[-1]["step"]
    in_steps = sum(names.first_of(row, names.STEP_SECONDS) or 0.0 for row in run.metrics)
    times = [event["time"] for event in run.events if event["time"] > 0]
    wall = max(times) - min(times) if len(times) > 1 else None
    change = f"{measure.lower()} {format_number(first)} -> {format_number(last)}" if points else "no accuracy or reward"
    duration = format_duration(wall if wall else in_steps or None)
    notable = [event for event in run.events if is_notable(event)]
    restarts = sum("restart" in event["reason"].lower() for event in run.events)
    total = run.job_value("spec.trainer.totalSteps")
    tiles = [
        ("Steps", f"{steps:,}", f"of {total:,}" if isinstance(total, int) else ""),
        ("Duration", duration, f"{format_duration(in_steps)} in steps" if wall and in_steps else ""),
        ("Model", str(run.job_value("spec.model.path") or "unknown"), ""),
        ("Preset", str(run.job_value("spec.algorithm.preset") or "none"), _recipe(run)),
    ]
    if len(points) > 2 and measure != "Reward":
        best_step, best = max(points, key=lambda point: point[1])
        tiles.append(("Best", format_number(best), f"at step {best_step}"))
    warnings, errors = (sum(event["level"] == level for event in notable) for level in ("warning", "error"))
    tiles.append(("Restarts", str(restarts), f"{_count(warnings, 'warning')}, {_count(errors, 'error')}"))
    return Summary(name, measure, first, last, f"{name}: {change}, {steps} steps, {duration}", tiles, notable)


def is_notable(event: Event) -> bool:
    """Warnings, errors, and what interrupts a run."""
    reason = event["reason"].lower()
    return event["level"] in {"warning", "error"} or any(
        word in reason for word in ("restart", "resum", "lost", "stop")
    )


def _measure(run: RunData) -> tuple[str, list[tuple[int, float]]]:
    if points := accuracy_points(run.metrics):
        return "Accuracy", points
    if points := points_of(run.metrics, names.TRAIN_ACCURACY):
        return "Training accuracy", points
    if points := points_of(run.metrics, names.VALIDATION_SCORE):
        return "Validation score", points
    return "Reward", points_of(run.metrics, names.REWARD)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _recipe(run: RunData) -> str:
    """The fields that most decide a run, as one remark."""
    fields = (
        ("{} prompts", "spec.data.trainBatchSize"), ("x {}", "spec.rollout.n"),
        ("lr {}", "spec.actor.optim.lr"), ("staleness {}", "spec.rollout.maxStaleness"),
    )  # fmt: skip
    parts = [
        text.format(f"{value:g}") for text, path in fields if isinstance(value := run.job_value(path), int | float)
    ]
    return ", ".join(parts).replace(", x ", " x ")
