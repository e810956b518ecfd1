"""The catalogue of metrics: what it lists is what processes expose, and what follows a number of a step follows it."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from grpo_worker import catalogue
from grpo_worker.catalogue import Declared, document, entries, reference

ROOT = Path(__file__).parents[1]
PROCESSES = [part["process"] for part in document()["processes"]]
OURS = [process for process in PROCESSES if process not in ("vllm", "client")]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def lines(registry: CollectorRegistry) -> list[str]:
    return [
        line
        for line in generate_latest(registry).decode().splitlines()
        if not line.startswith("#") and "_created" not in line
    ]


def test_the_reference_is_made_from_it() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == reference(), "run: make generated"


@pytest.mark.parametrize("process", PROCESSES)
def test_names_say_what_they_count(process: str) -> None:
    for name, entry in entries(process).items():
        assert (entry.kind == "counter") == name.endswith("_total"), name
        assert entry.kind in ("gauge", "counter", "histogram"), name
        assert (entry.kind == "histogram") == bool(entry.buckets), name
        assert entry.meaning, name


@pytest.mark.parametrize("process", OURS)
def test_units_are_base_units_and_stand_in_the_name(process: str) -> None:
    endings = {"seconds": "_seconds", "bytes": "_bytes", "Unix seconds": "_timestamp_seconds"}
    for name, entry in entries(process).items():
        if (ending := endings.get(entry.unit)) is not None:
            assert name.removesuffix("_total").endswith(ending), name
        assert not re.search(r"_(ms|milliseconds|gib|gb|mb|percent|minutes)(_|$)", name), name


@pytest.mark.parametrize("process", [process for process in OURS if process != "jobs"])
def test_no_object_has_its_name_on_a_metric(process: str) -> None:
    named = {"namespace", "grpojob", "job", "pod", "node", "uid", "instance"}
    assert not [name for name, entry in entries(process).items() if named & set(entry.labels)]


@pytest.mark.parametrize("process", ["coordinator", "trainer", "rollout"])
def test_no_label_is_one_that_scraping_adds(process: str) -> None:
    """Prometheus would rename ours to exported_..."""
    added = {"namespace", "grpojob", "role", "index", "job", "instance", "pod", "container", "endpoint"}
    assert not [name for name, entry in entries(process).items() if added & set(entry.labels)]


def test_counters_are_there_before_they_count_and_gauges_are_not(registry: CollectorRegistry) -> None:
    Declared("coordinator", registry)
    assert "grpo_coordinator_redispatched_prompts_total 0.0" in lines(registry)
    assert not [line for line in lines(registry) if line.startswith("grpo_coordinator_reward_mean")]


def test_what_follows_a_number_of_a_step(registry: CollectorRegistry) -> None:
    shown = Declared("coordinator", registry)
    step = {"critic/score/mean": 0.25, "timing_s/gen": 2.0, "timing_s/step": 3.0, "reward/format/mean": 0.5,
            "reward/solve_all": 0.125, "clip_ratio/low_mean": 0.01, "memory/updating_planned_gib": 2.0,
            "reward/timeout": 4.0, "perf/total_num_tokens": 100.0, "timing_s/trainer_update": 1.0}  # fmt: skip
    shown.follow(step)
    shown.follow(step | {"critic/score/mean": 0.75})
    found = lines(registry)
    for line in [
        "grpo_coordinator_reward_mean 0.75",
        'grpo_coordinator_step_part_seconds_total{part="gen"} 4.0',
        "grpo_coordinator_step_seconds_count 2.0",
        "grpo_coordinator_step_seconds_sum 6.0",
        'grpo_coordinator_reward_part_mean{part="format"} 0.5',
        'grpo_coordinator_solved_groups_ratio{solved="all"} 0.125',
        'grpo_coordinator_clip_end_ratio{end="low"} 0.01',
        'grpo_coordinator_device_memory_bytes{number="planned",phase="updating"} 2.147483648e+09',
        'grpo_coordinator_reward_failures_total{kind="timeout"} 8.0',
        "grpo_coordinator_trained_tokens_total 200.0",
    ]:
        assert line in found, "\n".join(found)
    assert not [line for line in found if "trainer_update" in line]


def test_names_that_a_reward_function_chose_are_bounded(registry: CollectorRegistry) -> None:
    shown = Declared("coordinator", registry)
    for number in range(catalogue.FREE_VALUES + 30):
        shown.follow({f"reward/part{number}/mean": 1.0})
    shown.follow({"reward/part0/mean": 2.0})
    parts = [line for line in lines(registry) if line.startswith("grpo_coordinator_reward_part_mean{")]
    assert len(parts) == catalogue.FREE_VALUES
    assert 'grpo_coordinator_reward_part_mean{part="part0"} 2.0' in parts


@pytest.mark.parametrize("process", OURS)
def test_what_is_followed_is_in_the_catalogue_too(process: str) -> None:
    written = {name: entry.pattern for name, entry in entries("step").items()}
    for entry in entries(process).values():
        if entry.follows:
            example = re.sub(r"<[^>]+>", "x", re.sub(r"\{([^,}]+)[^}]*\}", r"\1", entry.follows))
            assert any(pattern.fullmatch(example) for pattern in written.values()), f"{entry.name}: {example}"


def test_a_kind_that_is_not_the_catalogues_is_refused(registry: CollectorRegistry) -> None:
    shown = Declared("coordinator", registry)
    with pytest.raises(AssertionError, match="is a gauge"):
        shown.counter("grpo_coordinator_step")
    with pytest.raises(KeyError):
        shown.set("grpo_coordinator_nothing", 1)
