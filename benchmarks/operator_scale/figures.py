"""Pure parts of the benchmark: percentiles, tallies of audit records, ratios.

Invariant: both operators' figures come from the same functions.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed (nearest rank)."""
    if not values:
        raise ValueError("percentile of nothing")
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum."""
    return {
        "samples": len(seconds),
        "p50_seconds": round(percentile(seconds, 50), 4),
        "p95_seconds": round(percentile(seconds, 95), 4),
        "max_seconds": round(max(seconds), 4),
    }


def tally(lines: Iterable[str], user: str) -> Counter[tuple[str, str]]:
    """Requests of one user by (verb, resource), from the lines of an audit log.

    A watch is counted when it begins, everything else when it is answered, so each request is counted once.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for line in lines:
        record = json.loads(line)
        if record["user"]["username"] != user:
            continue
        verb, stage = record["verb"], record["stage"]
        if stage != ("ResponseStarted" if verb == "watch" else "ResponseComplete"):
            continue
        target = record.get("objectRef") or {}
        parts = (target.get("resource", "other"), target.get("subresource", ""))
        counts[verb, "/".join(part for part in parts if part)] += 1
    return counts


LEASES = "leases"


def for_jobs(counts: Counter[tuple[str, str]]) -> int:
    """Requests but those for the leader's Lease, whose number depends on time alone."""
    return sum(count for (_, resource), count in counts.items() if resource != LEASES)


def calls(counts: Counter[tuple[str, str]]) -> dict[str, Any]:
    """All, by verb, and by verb and resource; the last sorted by number."""
    by_verb: Counter[str] = Counter()
    for (verb, _), count in counts.items():
        by_verb[verb] += count
    by_resource = {f"{verb} {resource}": count for (verb, resource), count in counts.most_common()}
    return {"all": counts.total(), "by_verb": dict(by_verb.most_common()), "by_resource": by_resource}


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Theirs over ours: above 1, ours needs less."""
    return round(theirs / ours, 2) if ours and theirs is not None else None


def side_by_side(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Theirs over ours for each figure that both rounds have (theirs / ours; above 1: ours needs less)."""
    result = {}
    for part, names in COMPARED.items():
        for name in names:
            values = (ours.get(part, {}).get(name), theirs.get(part, {}).get(name))
            if None not in values:
                result[f"{part}.{name}"] = ratio(*values)
    return result


COMPARED = {
    "start": (
        "all_pods_exist_seconds",
        "all_seen_running_seconds",
        "calls_per_job",
        "calls_per_pod_event",
        "cpu_seconds",
        "apiserver_cpu_seconds",
    ),
    "event_to_status": ("p50_seconds", "p95_seconds", "calls_per_event"),
    "recreate": ("all_pods_exist_seconds",),
    "restart": ("resynced_seconds", "rss_mib"),
    "memory": ("after_start_rss_mib", "peak_rss_mib"),
}
