"""What being watched costs: a scrape's time and size, the share of a step, and the operator's memory with many jobs.

- `coordinator`: its registry after a step in which every number of the catalogue is known. `follow_ms` is what a step pays; `scrape_ms`, `bytes` and
  `series` what a scrape does.
- `operator`: the same of an operator with 0 and with 200 jobs of the size of examples/qwen3-8b-gsm8k.yaml, and its resident memory by job.

    python -m benchmarks.scrape
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from grpo_operator.control.metrics import JobView, OperatorMetrics
from grpo_operator.facts import Job, Pod, Report
from grpo_operator.labels import Role
from grpo_worker.catalogue import PART, Declared, entries
from grpo_worker.config import load_job
from grpo_worker.config.status import Checkpoints, Condition, GRPOJobStatus, Progress

EXAMPLE = Path(__file__).parents[1] / "examples" / "qwen3-8b-gsm8k.yaml"
NOW = datetime(2026, 11, 27, tzinfo=UTC)
JOBS, ROUNDS = 200, 50


def every_name(pattern: str) -> list[str]:
    """The names in metrics.jsonl that a pattern of the catalogue stands for; one for what is free."""
    match = PART.search(pattern)
    if match is None:
        return [pattern]
    words = match[1].split(",") if match[1] else ["x"]
    return [name for word in words for name in every_name(pattern[: match.start()] + word + pattern[match.end() :])]


def median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1000, 3)


def page(registry: CollectorRegistry) -> dict[str, Any]:
    text = generate_latest(registry)
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    return {"scrape_ms": median_ms(lambda: generate_latest(registry)), "bytes": len(text), "series": series}


def coordinator() -> dict[str, Any]:
    registry = CollectorRegistry()
    shown = Declared("coordinator", registry)
    step = {name: 0.5 for pattern in entries("step") for name in every_name(pattern)}
    shown.follow(step)
    return {"numbers_of_a_step": len(step), "follow_ms": median_ms(lambda: shown.follow(step)), **page(registry)}


def view(number: int) -> JobView:
    """A job in the middle of its work, with all of its pods."""
    spec = load_job(EXAMPLE).spec
    status = GRPOJobStatus(
        state="Training",
        conditions=[Condition(type=kind, status="True") for kind in ("Scheduled", "Ready", "Progressing", "CheckpointCurrent")],
        attempt=1,
        restarts=0,
        progress=Progress(step=number, total_steps=900, epoch=0.5, eta_seconds=60.0, reward=0.5, accuracy=0.5, tokens_per_second=9.0),
        checkpoints=Checkpoints(last_step=number),
    )  # fmt: skip
    name = f"job-{number}"
    pods = [
        Pod(f"{name}-{role}-{index}", f"{name}-{role}-{index}", role, index, 1, NOW, "Running", scheduled=True, ready=True)
        for role, count in ((Role.COORDINATOR, 1), (Role.TRAINER, spec.trainer.nodes), (Role.ROLLOUT, spec.rollout_pods))
        for index in range(count)
    ]  # fmt: skip
    return JobView(Job(name, "team", name, 1, NOW, spec, status, {}), tuple(pods), Report("p", NOW, {}))


def resident_kib() -> int:
    return int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1]
    )


def operator() -> dict[str, Any]:
    found: dict[str, Any] = {}
    views: list[JobView] = []
    metrics = OperatorMetrics(lambda: views)
    found["no jobs"] = page(metrics.registry)
    before = resident_kib()
    views += [view(number) for number in range(JOBS)]
    for each in views:
        blank = replace(each.job, status=GRPOJobStatus())
        metrics.count_change(blank, each.job)
    generate_latest(metrics.registry)
    found[f"{JOBS} jobs"] = page(metrics.registry) | {"kib_of_a_job": round((resident_kib() - before) / JOBS, 1)}
    return found


if __name__ == "__main__":
    print(json.dumps({"coordinator": coordinator(), "operator": operator()}, indent=1))
