"""Which curves a report shows, from the names in metrics.jsonl.

Invariant: a chart holds only what was logged: a missing or non-finite value is a gap, a chart without values does not exist.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grpo_worker.metric_loggers import names

Point = tuple[int, float]
MIN_POINTS_TO_SMOOTH = 20


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `color` is its slot in the palette."""

    label: str
    points: list[Point]
    color: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """One card of the report. `from_zero`: the axis starts at 0 wherever the values are."""

    key: str
    title: str
    note: str
    series: list[Series]
    digits: int = 3
    kind: Literal["line", "stack"] = "line"
    smoothed_over: int = 0  # steps; 0 is not smoothed
    from_zero: bool = True

    @property
    def main(self) -> list[Point]:
        """The points that the card's headline values come from."""
        return self.series[0].points


@dataclass(frozen=True, slots=True)
class _Spec:
    key: str
    title: str
    note: str
    lines: Sequence[tuple[str, Sequence[str]]]  # label, names of which the first that was logged is taken
    digits: int = 3
    from_zero: bool = True


_SPECS = (
    _Spec("reward", "Reward", "Mean score of the step's samples.", [("mean", names.REWARD)], from_zero=False),
    _Spec(
        "response_length", "Response length", "Tokens of a response.",
        [("mean", names.RESPONSE_LENGTH), ("longest", ("response_length/max",))], 1, False,
    ),
    _Spec(
        "kl", "KL", "How far the policy is from the reference model, or from the policy that sampled.",
        [("to reference", names.KL[:2]), ("old to new policy", names.KL[2:])], 4,
    ),
    _Spec(
        "entropy", "Entropy", "Of the token distribution, in nats; near 0 the policy has stopped exploring.",
        [("entropy", ("actor/entropy",))], 3, False,
    ),
    _Spec("grad_norm", "Gradient norm", "Before clipping.", [("norm", ("actor/grad_norm",))]),
    _Spec(
        "clip_fraction", "Clip fraction", "Share of the tokens whose ratio was clipped.",
        [("clipped", ("actor/pg_clipfrac",)), ("dual clip", ("actor/pg_clipfrac_lower",))], 4,
    ),
    _Spec(
        "mismatch", "Log-prob mismatch", "Mean absolute difference between trainer and engine; a rise means that they disagree.",
        [
            ("log-probs", ("training/rollout_logprobs_abs_diff_mean",)),
            ("probabilities", ("training/rollout_probs_diff_mean",)),
        ], 4,
    ),
    _Spec("throughput", "Tokens per second", "Prompt and response tokens, per device.", [("tokens/s", names.TOKENS_PER_SECOND)], 0),
    _Spec(
        "staleness", "Staleness", "Versions between the weights that sampled and the weights that were trained.",
        [("mean", names.STALENESS_MEAN), ("max", names.STALENESS_MAX)], 2,
    ),
)  # fmt: skip

ALL_TITLES = [_SPECS[0].title, "Validation accuracy", *(spec.title for spec in _SPECS[1:]), "Step time"]


def make_charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts that the metrics have values for, in the report's order."""
    charts = [chart for spec in _SPECS if (chart := _line_chart(spec, metrics)) is not None]
    if (validation := _validation_chart(metrics)) is not None:
        charts.insert(1 if charts and charts[0].key == "reward" else 0, validation)
    if (times := _step_time_chart(metrics)) is not None:
        charts.append(times)
    return charts


def points_of(metrics: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Point]:
    """(step, value) of the first of `keys` that any step has a value for."""
    for key in keys:
        points = [(row["step"], value) for row in metrics if (value := names.finite(row.get(key))) is not None]
        if points:
            return points
    return []


def accuracy_points(metrics: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Validation accuracy: pass@1, else the first validation accuracy that was logged."""
    if points := points_of(metrics, names.VALIDATION_ACCURACY):
        return points
    return points_of(metrics, [key for key in _validation_keys(metrics) if "accuracy" in key])


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Centred moving average over `window` points; towards the ends over as many as there are on both sides."""
    result = []
    for i, (step, _) in enumerate(points):
        half = min(window // 2, i, len(points) - 1 - i)
        near = [value for _, value in points[i - half : i + half + 1]]
        result.append((step, sum(near) / len(near)))
    return result


def _line_chart(spec: _Spec, metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    found = [(label, points) for label, keys in spec.lines if (points := points_of(metrics, keys))]
    if not found:
        return None
    if len(found) == 1 and len(found[0][1]) >= MIN_POINTS_TO_SMOOTH:
        label, points = found[0]
        window = max(3, len(points) // 20 | 1)
        series = [Series(label, points, faint=True), Series(label, smooth(points, window))]
        return Chart(spec.key, spec.title, spec.note, series, spec.digits, "line", window, spec.from_zero)
    series = [Series(label, points, color) for color, (label, points) in enumerate(found)]
    return Chart(spec.key, spec.title, spec.note, series, spec.digits, from_zero=spec.from_zero)


def _validation_keys(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in metrics for key in row if key.startswith("val/")))


def _validation_chart(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Accuracy on the held-out prompts; their score where the reward function gives no accuracy."""
    kind, note = "accuracy", "Share of the held-out prompts that are answered right."
    points = accuracy_points(metrics)
    if not points:
        kind, note = "score", "Mean score of the held-out prompts; the reward function gives no accuracy."
        points = points_of(metrics, names.VALIDATION_SCORE)
    if not points:
        return None
    series = [Series("pass@1, greedy" if kind == "accuracy" else "greedy", points, dots=True)]
    for key in _validation_keys(metrics):
        name = key.removeprefix(f"val/{kind}/")
        if name.startswith("mean@") and (more := points_of(metrics, [key])):
            series.append(Series(f"{name}, sampled", more, len(series), dots=True))
    return Chart("validation", f"Validation {kind}", note, series[:4], from_zero=False)


def _step_time_chart(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Seconds of each part; "other" is what the parts leave of the step."""
    rows = [row for row in metrics if row["step"] > 0]
    logged = {key.removeprefix("timing_s/") for row in rows for key in row if key.startswith("timing_s/")}
    parts = [part for part in names.STEP_PARTS if part in logged]
    series = []
    for part in parts:
        points = [(row["step"], max(0.0, names.finite(row.get(f"timing_s/{part}")) or 0.0)) for row in rows]
        if any(value > 0 for _, value in points):
            series.append(Series(part, points, names.STEP_PARTS.index(part)))
    other = []
    for i, row in enumerate(rows):
        known = sum(line.points[i][1] for line in series)
        total = names.first_of(row, names.STEP_SECONDS)
        other.append((row["step"], max(0.0, total - known) if total is not None else 0.0))
    if any(value > 0 for _, value in other):
        series.append(Series("other", other, len(names.STEP_PARTS)))
    if not series:
        return None
    note = "Seconds of a step by part; with rollout.maxStaleness above 0 the parts overlap."
    return Chart("step_time", "Step time", note, series, 1, "stack")
