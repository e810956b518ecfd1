"""What a report knows: the files of one run directory.

Invariant: only metrics.jsonl must be there; every other file may be missing, torn or of another version, and is then listed in
`problems`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_worker.config import parse_yaml
from grpo_worker.errors import DataError, UsageError
from grpo_worker.metric_loggers.events import Event, read_events

MAX_SAMPLES = 20
RUN_DIRECTORY = "job.yaml, metrics.jsonl, events.jsonl, samples.jsonl, logs/ and checkpoints/"


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of samples.jsonl."""

    step: int
    prompt: str
    response: str
    ground_truth: str
    score: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class SamplePair:
    """The same prompt at the first and at the last step that sampled it; `after` is None when these are one."""

    before: Sample
    after: Sample | None


@dataclass(frozen=True, slots=True)
class RunData:
    """A run directory in memory. `metrics` rise strictly in `step`."""

    run_dir: Path
    metrics: list[dict[str, Any]]
    events: list[Event] = field(default_factory=list)
    samples: list[SamplePair] = field(default_factory=list)
    sample_kind: str = "validation"
    job_text: str = ""
    job: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def job_value(self, path: str) -> Any:
        """The value at a dotted path of the job, or None."""
        node: Any = self.job
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return node


def read_run(run_dir: Path) -> RunData:
    """Read a run directory. Raises DataError when it holds no metrics."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run directory. A run directory holds {RUN_DIRECTORY}.")
    problems: list[str] = []
    metrics = _metrics(run_dir, problems)
    if not metrics:
        why = "metrics.jsonl holds no step yet" if (run_dir / "metrics.jsonl").exists() else "there is no metrics.jsonl"
        raise DataError(
            f"{run_dir}: nothing to report, {why}. A run directory holds {RUN_DIRECTORY}; "
            "metrics.jsonl is written by the logger `jsonl` of trainer.loggers after each step."
        )
    samples, kind = _samples(run_dir, problems)
    job_text, job = _job(run_dir, problems)
    try:
        events, _ = read_events(run_dir / "events.jsonl")
    except OSError as error:
        events = []
        problems.append(f"events.jsonl cannot be read: {error.strerror}")
    return RunData(run_dir, metrics, events, samples, kind, job_text, job, problems)


def _metrics(run_dir: Path, problems: list[str]) -> list[dict[str, Any]]:
    by_step = {
        raw["step"]: raw
        for raw in objects(run_dir / "metrics.jsonl", problems)
        if isinstance(raw.get("step"), int) and not isinstance(raw["step"], bool)
    }
    return [by_step[step] for step in sorted(by_step)]


def _samples(run_dir: Path, problems: list[str]) -> tuple[list[SamplePair], str]:
    """First and last completion of each prompt, in file order; training samples only when there are no others."""
    first: dict[str, dict[str, Sample]] = {"validation": {}, "train": {}}
    last: dict[str, dict[str, Sample]] = {"validation": {}, "train": {}}
    for raw in objects(run_dir / "samples.jsonl", problems):
        kind = str(raw.get("kind", "validation"))
        step = raw.get("step")
        if kind not in first or not isinstance(step, int):
            continue
        key = str(raw.get("uid", raw.get("prompt")))
        sample = Sample(
            step=step,
            prompt=_text(raw.get("prompt")),
            response=_text(raw.get("response")),
            ground_truth=_text(raw.get("ground_truth")),
            score=_number(raw.get("score")),
            accuracy=_number(raw.get("accuracy")),
        )
        if key not in first[kind]:
            if len(first[kind]) >= MAX_SAMPLES:
                continue
            first[kind][key] = sample
        if step > first[kind][key].step:
            last[kind][key] = sample
    kind = "validation" if first["validation"] else "train"
    return [SamplePair(sample, last[kind].get(key)) for key, sample in first[kind].items()], kind


def _job(run_dir: Path, problems: list[str]) -> tuple[str, Mapping[str, Any]]:
    path = run_dir / "job.yaml"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"job.yaml cannot be read: {error.strerror}")
        return "", {}
    try:
        job = parse_yaml(text, "job.yaml")
    except UsageError as error:
        problems.append(str(error))
        return text, {}
    return text, job if isinstance(job, Mapping) else {}


def objects(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, a line at a time; lines that are none are counted."""
    bad = 0
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    raw = json.loads(line)
                except ValueError:
                    raw = None
                if isinstance(raw, dict):
                    yield raw
                elif line.strip():
                    bad += 1
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    if bad:
        problems.append(f"{path.name}: {bad} line{'s' if bad > 1 else ''} left out (torn or not JSON objects)")


def _text(value: Any) -> str:
    """Text as it is; a list of chat messages as `role: content` paragraphs; anything else as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n\n".join(f"{message.get('role', '')}: {message['content']}" for message in value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
