"""For tests: which of the names in metrics.jsonl the catalogue does not list."""

from collections.abc import Iterable, Mapping
from typing import Any

from grpo_worker.catalogue import entries


def unlisted(lines: Iterable[Mapping[str, Any]]) -> set[str]:
    patterns = [entry.pattern for entry in entries("step").values()]
    names = {name for line in lines for name in line}
    return {name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)}
