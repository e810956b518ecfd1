"""Alerts, judged by Prometheus' own promtool: each fires on what it is for, within its time, and stays quiet beside it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

RULES = sorted((Path(__file__).parents[2] / "charts" / "grpo-operator" / "files" / "alerts").iterdir())
JOB = 'namespace="team", grpojob="demo"'
OF_JOB = {"namespace": "team", "grpojob": "demo"}
TRAINS = {f'grpo_job_info{{{JOB}, model="m", state="Training"}}': "1x600"}
SUSPENDED = {f'grpo_job_info{{{JOB}, model="m", state="Suspended"}}': "1x600"}
STALL_LIMIT = {f"grpo_job_stall_timeout_seconds{{{JOB}}}": "3600x600"}
BEHIND = f'grpo_job_condition{{{JOB}, type="CheckpointCurrent", status="%s"}}'
FAILED = f'grpo_job_condition{{{JOB}, type="Failed", status="%s"}}'
SCHEDULED = f'grpo_job_condition{{{JOB}, type="Scheduled", status="%s"}}'

# Values a minute in promtool's notation, by name and labels: 1x9 is ten times 1, 0+2x9 counts up by 2.
Series = dict[str, str]


def job(**values: str) -> Series:
    return {f"grpo_job_{name}{{{JOB}}}": value for name, value in values.items()}


def run(**values: str) -> Series:
    return {f"grpo_coordinator_{name}{{{JOB}}}": value for name, value in values.items()}


def disk(free: str) -> Series:
    labels = f'{{{JOB}, directory="checkpoints"}}'
    return {
        f"grpo_coordinator_disk_free_bytes{labels}": free,
        f"grpo_coordinator_disk_size_bytes{labels}": "1000000x600",
    }


def rewards(kind: str, values: str) -> Series:
    return {f'grpo_coordinator_reward_failures_total{{{JOB}, kind="{kind}"}}': values}


def reconciles(errors: str, successes: str) -> Series:
    results = {"error": errors, "success": successes}
    return {f'grpo_operator_reconcile_total{{result="{result}"}}': values for result, values in results.items()}


def sync(part: str, whole: str) -> Series:
    labels = f'{{{JOB}, part="update_weights"}}'
    return {f"grpo_coordinator_step_part_seconds_total{labels}": part} | run(step_seconds_sum=whole)


# Alert, minute, series, labels of what fires at that minute; None: nothing does. Time 0 is the Unix epoch, so a timestamp of 0 is the start.
CASES: list[tuple[str, str, Series, dict[str, str] | None]] = [
    ("GRPOJobStalled", "32m", job(last_progress_timestamp_seconds="0x600") | STALL_LIMIT | TRAINS, OF_JOB),
    ("GRPOJobStalled", "29m", job(last_progress_timestamp_seconds="0x600") | STALL_LIMIT | TRAINS, None),
    ("GRPOJobStalled", "90m", job(last_progress_timestamp_seconds="0+60x600") | STALL_LIMIT | TRAINS, None),
    ("GRPOJobStalled", "90m", job(last_progress_timestamp_seconds="0x600") | STALL_LIMIT | SUSPENDED, None),
    ("GRPOCoordinatorUnreachable", "4m", job(report_timestamp_seconds="0x600") | TRAINS, OF_JOB),
    ("GRPOCoordinatorUnreachable", "60m", job(report_timestamp_seconds="0+60x600") | TRAINS, None),
    ("GRPOCoordinatorUnreachable", "60m", job(report_timestamp_seconds="0x600") | SUSPENDED, None),
    ("GRPOCheckpointBehind", "11m", {BEHIND % "False": "1x600"}, OF_JOB | {"type": "CheckpointCurrent", "status": "False"}),
    ("GRPOCheckpointBehind", "9m", {BEHIND % "False": "1x600"}, None),
    ("GRPOCheckpointBehind", "60m", {BEHIND % "True": "1x600"}, None),
    ("GRPOCheckpointBehind", "60m", {BEHIND % "Unknown": "1x600"}, None),
    ("GRPOCheckpointOld", "246m", job(last_checkpoint_timestamp_seconds="0x600") | TRAINS, OF_JOB),
    ("GRPOCheckpointOld", "230m", job(last_checkpoint_timestamp_seconds="0x600") | TRAINS, None),
    ("GRPOCheckpointOld", "300m", job(last_checkpoint_timestamp_seconds="0x600") | SUSPENDED, None),
    ("GRPOJobRestartLoop", "1m", job(budget_restarts="3x600", max_restarts="5x600"), OF_JOB),
    ("GRPOJobRestartLoop", "60m", job(budget_restarts="2x600", max_restarts="5x600"), None),
    ("GRPOJobRestartLoop", "60m", job(budget_restarts="1x600", max_restarts="1x600"), None),
    ("GRPOJobFailed", "1m", {FAILED % "True": "1x600"}, OF_JOB | {"type": "Failed", "status": "True"}),
    ("GRPOJobFailed", "60m", {FAILED % "False": "1x600"}, None),
    ("GRPOJobNotScheduled", "16m", {SCHEDULED % "False": "1x600"} | TRAINS, OF_JOB | {"type": "Scheduled", "status": "False"}),
    ("GRPOJobNotScheduled", "14m", {SCHEDULED % "False": "1x600"} | TRAINS, None),
    ("GRPOJobNotScheduled", "60m", {SCHEDULED % "False": "1x600"} | SUSPENDED, None),
    ("GRPOEnginesBelowMinimum", "6m", job(rollouts_ready="1x600", rollouts_min="2x600") | TRAINS, OF_JOB),
    ("GRPOEnginesBelowMinimum", "60m", job(rollouts_ready="2x600", rollouts_min="2x600") | TRAINS, None),
    ("GRPOEnginesBelowMinimum", "60m", job(rollouts_ready="1x3 2x600", rollouts_min="2x600") | TRAINS, None),
    ("GRPORewardAllEqual", "16m", run(reward_max="0x600", reward_min="0x600"), OF_JOB),
    ("GRPORewardAllEqual", "16m", run(reward_max="1x600", reward_min="1x600"), OF_JOB),
    ("GRPORewardAllEqual", "60m", run(reward_max="1x600", reward_min="0x600"), None),
    ("GRPORewardAllEqual", "60m", run(reward_max="0x10 1x600", reward_min="0x600"), None),
    ("GRPORewardCollapsed", "80m", run(reward_mean="0.8x60 0.3x100"), OF_JOB),
    ("GRPORewardCollapsed", "120m", run(reward_mean="0.1+0.01x200"), None),
    ("GRPORewardCollapsed", "120m", run(reward_mean="-0.2x60 -0.8x100"), None),
    ("GRPOEntropyCollapsed", "80m", run(entropy="1.5x60 0.1x100"), OF_JOB),
    ("GRPOEntropyCollapsed", "80m", run(entropy="1.5x60 0.4x100"), None),
    ("GRPORewardFunctionFailing", "25m", rewards("timeout", "0+1x600"), OF_JOB | {"kind": "timeout"}),
    ("GRPORewardFunctionFailing", "60m", rewards("timeout", "7x600"), None),
    ("GRPORewardFunctionFailing", "60m", rewards("crash", "0x30 1x600"), None),
    ("GRPOStalenessHigh", "6m", run(staleness_max="2x600", staleness_limit="1x600"), OF_JOB),
    ("GRPOStalenessHigh", "60m", run(staleness_max="1x600", staleness_limit="1x600"), None),
    ("GRPOMismatchHigh", "16m", run(mismatch_k3="0.2x600"), OF_JOB),
    ("GRPOMismatchHigh", "60m", run(mismatch_k3="0.004x600"), None),
    ("GRPOUpdatesSkipped", "40m", {f"grpo_trainer_skipped_updates{{{JOB}}}": "0+1x600"}, OF_JOB),
    ("GRPOUpdatesSkipped", "60m", {f"grpo_trainer_skipped_updates{{{JOB}}}": "9x600"}, None),
    ("GRPOWeightSyncFailing", "20m", {f"grpo_rollout_weight_sync_failures_total{{{JOB}, reason=\"Stalled\", index=\"0\"}}": "0+1x600"}, OF_JOB),
    ("GRPOWeightSyncFailing", "60m", {f"grpo_rollout_weight_sync_failures_total{{{JOB}, reason=\"Stalled\", index=\"0\"}}": "0x30 1x600"}, None),
    ("GRPOWeightSyncSlow", "60m", sync("0+30x600", "0+60x600"), OF_JOB),
    ("GRPOWeightSyncSlow", "60m", sync("0+6x600", "0+60x600"), None),
    ("GRPODiskFilling", "6m", disk("50000x600"), OF_JOB | {"directory": "checkpoints"}),
    ("GRPODiskFilling", "60m", disk("400000x600"), None),
    ("GRPOOperatorAbsent", "6m", {"grpo_operator_leader": "0x600"}, {}),
    ("GRPOOperatorAbsent", "6m", {"up": "1x600"}, {}),
    ("GRPOOperatorAbsent", "60m", {'grpo_operator_leader{pod="a"}': "1x600", 'grpo_operator_leader{pod="b"}': "0x600"}, None),
    ("GRPOOperatorWatchStale", "3m", {"grpo_operator_watch_overdue_seconds": "90x600"}, {}),
    ("GRPOOperatorWatchStale", "60m", {"grpo_operator_watch_overdue_seconds": "40x600"}, None),
    ("GRPOOperatorQueueGrowing", "6m", {"grpo_operator_workqueue_oldest_seconds": "70x600"}, {}),
    ("GRPOOperatorQueueGrowing", "60m", {"grpo_operator_workqueue_oldest_seconds": "2x600"}, None),
    ("GRPOOperatorReconcileErrors", "30m", reconciles("0+2x600", "0+8x600"), {}),
    ("GRPOOperatorReconcileErrors", "60m", reconciles("0+1x600", "0+99x600"), None),
]  # fmt: skip


def rules() -> dict[str, dict[str, Any]]:
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def test_the_rules_are_prometheus_rules(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", *RULES], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_configuration_loads_them(promtool: str) -> None:
    example = Path(__file__).parents[2] / "examples" / "observe" / "prometheus.yaml"
    done = subprocess.run(
        [promtool, "check", "config", example], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "1 rule files found" in done.stdout, done.stdout + done.stderr


def test_each_alert_is_seen_to_fire_and_to_stay_quiet() -> None:
    assert {name for name, _, _, fires in CASES if fires is not None} == set(rules())
    assert {name for name, _, _, fires in CASES if fires is None} == set(rules())


def test_they_fire_when_they_should_and_only_then(promtool: str, tmp_path: Path) -> None:
    """All cases in one file: promtool names the alert and the time of what is not as it should be."""
    tests = [
        {
            "name": f"case {number}: {alert} after {minute}",
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'ALERTS{{alertname="{alert}", alertstate="firing"}}',
                    "eval_time": minute,
                    "exp_samples": [
                        {"labels": _alert(alert, fires), "value": 1}
                    ] if fires is not None else [],
                }
            ],
        }
        for number, (alert, minute, series, fires) in enumerate(CASES)
    ]  # fmt: skip
    file = tmp_path / "tests.yaml"
    file.write_text(json.dumps({"rule_files": list(map(str, RULES)), "evaluation_interval": "30s", "tests": tests}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_their_words_can_be_filled_in(promtool: str, tmp_path: Path) -> None:
    """promtool fills in the annotations of what fires: a template that fails says so in the text."""
    tests = []
    for alert, minute, series, fires in CASES:
        if fires is not None:
            wanted = {"eval_time": minute, "alertname": alert, "exp_alerts": []}
            tests.append({"interval": "1m", "alert_rule_test": [wanted], "input_series": [{"series": name, "values": values} for name, values in series.items()]})  # fmt: skip
    file = tmp_path / "tests.yaml"
    file.write_text(json.dumps({"rule_files": list(map(str, RULES)), "evaluation_interval": "30s", "tests": tests}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, timeout=240, check=False)
    said = done.stdout + done.stderr
    # All fire, so promtool lists each beside the expected nothing, with its texts.
    assert said.count("Annotations:") >= len(tests)
    for text in ("error expanding", "{{", "<no value>", "%!"):
        assert text not in said, said


def _alert(name: str, labels: dict[str, str]) -> str:
    every = {"alertname": name, "alertstate": "firing", "severity": rules()[name]["labels"]["severity"], **labels}
    return "ALERTS{" + ", ".join(f'{key}="{value}"' for key, value in every.items()) + "}"
