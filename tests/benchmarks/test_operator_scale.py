"""The pure parts of the benchmark of the operator at scale."""

import json

import pytest
from benchmarks.operator_scale.__main__ import aims
from benchmarks.operator_scale.figures import calls, for_jobs, latencies, percentile, side_by_side, tally
from benchmarks.operator_scale.stage import STEP_SECONDS, Coordinators

USER = "system:serviceaccount:grpo-system:grpo-operator"


def record(
    verb: str, resource: str, *, stage: str = "ResponseComplete", user: str = USER, subresource: str = ""
) -> str:
    target = {"resource": resource, "namespace": "jobs"} | ({"subresource": subresource} if subresource else {})
    return json.dumps({"stage": stage, "verb": verb, "user": {"username": user}, "objectRef": target})


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([3.0], 95, 3.0), ([1.0, 2.0, 3.0, 4.0], 50, 2.0), (list(range(1, 101)), 95, 95), (list(range(1, 21)), 95, 19)],
)
def test_a_percentile_is_the_nearest_rank(values, percent, expected):
    assert percentile(values, percent) == expected


def test_latencies_tell_how_many_samples_they_are_made_of():
    assert latencies([0.2, 0.1, 0.3]) == {"samples": 3, "p50_seconds": 0.2, "p95_seconds": 0.3, "max_seconds": 0.3}


def test_each_request_is_counted_once_and_a_watch_when_it_begins():
    lines = [
        record("watch", "pods", stage="ResponseStarted"),
        record("watch", "pods"),
        record("create", "pods"),
        record("create", "pods"),
        record("create", "pods", stage="ResponseStarted"),
        record("patch", "grpojobs", subresource="status"),
        json.dumps({"stage": "ResponseComplete", "verb": "get", "user": {"username": USER}}),
    ]
    counts = tally(lines, USER)
    assert counts == {("watch", "pods"): 1, ("create", "pods"): 2, ("patch", "grpojobs/status"): 1, ("get", "other"): 1}
    assert calls(counts)["by_verb"] == {"create": 2, "watch": 1, "patch": 1, "get": 1}


def test_requests_of_others_are_not_counted():
    assert not tally([record("create", "pods", user="system:kube-scheduler")], USER)


def test_lease_renewals_are_no_work_for_jobs():
    counts = tally([record("update", "leases"), record("get", "leases"), record("create", "pods")], USER)
    assert for_jobs(counts) == 1
    assert calls(counts)["all"] == 3


def test_figures_are_compared_where_both_have_them():
    ours = {"start": {"cpu_seconds": 2.0, "calls_per_job": 30.0}, "memory": {"peak_rss_mib": 100.0}}
    theirs = {"start": {"cpu_seconds": 1.0, "calls_per_job": 60.0}}
    assert side_by_side(ours, theirs) == {"start.calls_per_job": 2.0, "start.cpu_seconds": 0.5}


def test_an_aim_without_a_measurement_is_not_met():
    found = aims(
        {
            "memory": {"peak_rss_mib": 249.0},
            "event_to_status_training": {"p95_seconds": 2.0},
            "restart": {"resynced_seconds": 3.0},
        }
    )
    assert {name: aim["met"] for name, aim in found.items()} == {
        "peak_rss_mib": True,
        "event_to_status_p95_seconds": False,
        "cold_start_seconds": True,
        "recreate_64_pods_seconds": False,
    }


def test_jobs_have_no_step_until_they_train_and_then_one_a_minute():
    coordinators = Coordinators(0, rollouts=2)
    assert coordinators.document("token", 1000.0)["step"] == 0
    coordinators.train()
    now = coordinators.document("token", 0.0)["started_time"]
    steps = [coordinators.document("token", now + minute * STEP_SECONDS)["step"] for minute in range(4)]
    assert steps == [0, 1, 2, 3]
