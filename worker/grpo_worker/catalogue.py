"""The catalogue of metrics (catalogue.yaml), and the Prometheus metrics that a process declares from it.

Invariant: a process has the metrics that the catalogue lists for it and no others; a number that is not known is absent, never 0.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

FILE = Path(__file__).with_suffix(".yaml")
FREE_VALUES = 50  # of a label whose values the job's own code chooses
PART = re.compile(r"\{([^}]+)\}|<[^>]+>")


@dataclass(frozen=True)
class Entry:
    """A metric as the catalogue has it."""

    name: str
    meaning: str
    kind: str = ""  # gauge, counter, histogram; of metrics.jsonl: ""
    unit: str = ""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    follows: str = ""
    scale: float = 1.0
    experts: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        """Of the names in metrics.jsonl that it is, or follows: a group for each {} and <>."""
        written, parts, end = self.follows or self.name, [], 0
        for match in PART.finditer(written):
            words = match[1].split(",") if match[1] else None
            choice = "|".join(map(re.escape, words)) if words else "[^/]+"
            parts += [re.escape(written[end : match.start()]), f"({choice})"]
            end = match.end()
        return re.compile("".join([*parts, re.escape(written[end:])]))


@cache
def document() -> Mapping[str, Any]:
    return dict(yaml.load(FILE.read_text(), yaml.CSafeLoader))


@cache
def entries(process: str) -> Mapping[str, Entry]:
    """Prometheus metrics of a process by name. `step` stands for metrics.jsonl."""
    sections = document()["step_metrics" if process == "step" else "processes"]
    rows = [row for part in sections if process in ("step", part.get("process")) for row in part["metrics"]]
    lists = ("labels", "buckets")
    return {row["name"]: Entry(**row | {key: tuple(row[key]) for key in lists if key in row}) for row in rows}


Number = tuple[str, tuple[str, ...], float]  # name of a gauge, values of its labels, value


class Declared(Collector):
    """The metrics of one process in its registry. Gauges are absent until they are known."""

    def __init__(self, process: str, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._entries = entries(process)
        self._made: dict[str, Any] = {}
        self._followers = [(entry.pattern, entry) for entry in self._entries.values() if entry.follows]
        self._known: dict[str, list[tuple[Entry, tuple[str, ...]]]] = {}  # by name in metrics.jsonl
        self._last: dict[str, dict[tuple[str, ...], float]] = {}  # of gauges that were set: value by labels
        self._sources: list[Callable[[], Iterable[Number]]] = []
        registry.register(self)
        for name, entry in self._entries.items():  # a counter is there, at 0, before there is something to count
            if not entry.labels and entry.kind in ("counter", "histogram"):
                self.counter(name) if entry.kind == "counter" else self.histogram(name)

    def counter(self, name: str) -> Counter:
        return self._make(name, Counter)

    def histogram(self, name: str) -> Histogram:
        return self._make(name, Histogram, buckets=self._entries[name].buckets)

    def set(self, name: str, value: float, *labels: str) -> None:
        """A gauge, until it is set again."""
        self._last.setdefault(self._entries[name].name, {})[labels] = value

    def ask(self, source: Callable[[], Iterable[Number]]) -> None:
        """Gauges of which `source` tells at each scrape."""
        self._sources.append(source)

    def follow(self, metrics: Mapping[str, float]) -> None:
        """The numbers of a step, for all that follow them."""
        for key, value in metrics.items():
            for entry, labels in self._followers_of(key):
                if entry.kind == "gauge":
                    self.set(entry.name, value * entry.scale, *labels)
                elif entry.kind == "counter":
                    counter = self.counter(entry.name)
                    (counter.labels(*labels) if labels else counter).inc(value * entry.scale)
                else:
                    self.histogram(entry.name).observe(value * entry.scale)

    def collect(self) -> Iterator[Metric]:
        last = [(name, dict(values)) for name, values in list(self._last.items())]  # other threads set meanwhile
        numbers = [(name, labels, value) for name, values in last for labels, value in values.items()]
        families: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in chain(numbers, *(source() for source in self._sources)):
            if name not in families:
                entry = self._entries[name]
                families[name] = GaugeMetricFamily(name, _help(entry), labels=entry.labels)
            families[name].add_metric(labels, value)
        yield from families.values()

    def _make(self, name: str, kind: type[Any], **options: Any) -> Any:
        if name not in self._made:
            entry = self._entries[name]
            assert entry.kind == kind.__name__.lower(), f"{name} is a {entry.kind}"
            self._made[name] = kind(name, _help(entry), entry.labels, registry=self._registry, **options)
        return self._made[name]

    def _followers_of(self, key: str) -> list[tuple[Entry, tuple[str, ...]]]:
        if key not in self._known:
            matches = [(entry, pattern.fullmatch(key)) for pattern, entry in self._followers]
            found = [(entry, tuple(match.groups())) for entry, match in matches if match]
            self._known[key] = [
                (entry, labels) for entry, labels in found if len(self._last.get(entry.name, ())) < FREE_VALUES
            ]
        return self._known[key]


def _help(entry: Entry) -> str:
    text = f"{entry.meaning[:1].upper()}{entry.meaning[1:]}".replace("`", "")
    return f"{text}, in {entry.unit}." if entry.unit and entry.unit not in ("score", "0..1") else f"{text}."


def reference() -> str:
    """docs/metrics.md."""
    content = document()
    parts = [content["introduction"].rstrip()]
    for section in content["step_metrics"]:
        parts.append(_section(section, ("name", "unit", "meaning")))
    parts.append(content["prometheus"].rstrip())
    for process in content["processes"]:
        parts.append(_section(process, ("name", "kind", "unit", "meaning")))
    return "\n\n".join(parts) + "\n"


def _section(section: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    lines = [f"### {section['title']}", ""]
    if "text" in section:
        lines += [section["text"].rstrip(), ""]
    lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in section["metrics"]:
        labels = f"{{{','.join(row['labels'])}}}" if "labels" in row else ""
        follows = f" (`{row['follows']}`)" if row.get("follows") and f"`{row['follows']}`" not in row["meaning"] else ""
        cells = {
            **row,
            "name": f"`{row['name']}{labels}`",
            "meaning": f"{row['meaning']}{follows}".replace("|", "\\|"),
        }
        lines.append(f"| {' | '.join(str(cells.get(column, '')) for column in columns)} |".replace("|  |", "| |"))
    return "\n".join(lines)
