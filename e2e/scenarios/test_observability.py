"""What a person sees: every expression of every dashboard has data while a job trains, and alerts fire on what they are for, and resolve."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml
from charts.dashboards.__main__ import DASHBOARDS
from charts.dashboards.pictures import Server, write_pictures
from e2e.cluster.host import wait_until
from e2e.cluster.node import Node
from e2e.scenarios.containers import kill_container
from e2e.scenarios.prometheus import Prometheus, prometheus
from e2e.scenarios.release import CHART, NAME, NAMESPACE, Release
from e2e.scenarios.training import ENDLESS, Job, Tenant

MONITORS = (
    "metrics.namespaces={monitoring}", "metrics.serviceMonitor.enabled=true", "metrics.podMonitor.enabled=true",
    "metrics.rules.enabled=true",
)  # fmt: skip
RATE_INTERVAL = "30s"
DISK_MEBIBYTES = 400
# Nothing is learned while the file is there.
REWARD = """
import os, random


def score(sample, method=""):
    right = 0.0 if os.path.exists("flat") else float(random.random() < 0.5)
    return {"score": right, "acc": right, "length": float(len(sample.response))}
"""
# Parts of expressions that find nothing here, and why.
EMPTY = {
    "grpo_coordinator_mfu_ratio": "no GPU",
    "grpo_trainer_max_memory_allocated_bytes": "no GPU",
    "grpo_coordinator_device_memory_bytes": "not colocated",
    "grpo_coordinator_kl{": "no KL term in the loss",
    "grpo_coordinator_reward_kl": "no KL term in the reward",
    "grpo_coordinator_rejected_tokens_ratio": "no rolloutRs",
    "grpo_coordinator_reward_failures_total": "no reward has failed",
    "grpo_rollout_errors_total": "no engine has answered with an error",
    "grpo_rollout_weight_sync_failures_total": "no sync has failed",
    "grpo_job_restarts_total": "no pod has failed yet",
    "grpo_job_lost_gpu_seconds_total": "no GPU",
    "grpo_job_finished_total": "no job has ended since the operator started",
    'type=~"Failed|Restarting"': "all is well",
    'part="save_checkpoint"': "a step with a save may lie behind the window",
}


def test_dashboards_have_data_and_alerts_fire_and_resolve(
    make_tenant: Callable[..., Tenant], release: Release, own_node: Node, tmp_path: Path
) -> None:
    tenant, began = make_tenant(DISK_MEBIBYTES), time.time()
    rendered = release.cluster.helm("template", NAME, str(CHART), "--namespace", NAMESPACE, "--kube-version=v1.36.0", *(word for value in MONITORS for word in ("--set", value)))  # fmt: skip
    monitors = [
        document for document in yaml.safe_load_all(rendered) if document and "monitoring" in document["apiVersion"]
    ]
    tenant.write("flat_reward.py", REWARD)
    tenant.shell("touch", "flat")
    job = tenant.submit(
        "watched",
        reward={"function": "flat_reward.py:score"},
        rollout={"replicas": 2, "minReplicas": 2, "maxStaleness": 1},
        trainer=ENDLESS | {"testFreq": 50},
        checkpoint={"saveFreq": 5},
        network={"memberTimeoutSeconds": 300},
        failurePolicy={"stallTimeoutSeconds": 80, "maxRestarts": 3, "backoffSeconds": 1},
    )
    with prometheus(tmp_path, monitors, release.cluster) as watching:
        job.until_step(6)
        job.until_all_ready()
        problems = [
            rule for group in watching.ask("rules")["groups"] for rule in group["rules"] if rule["health"] == "err"
        ]
        assert not problems

        # Half of the engines hang: readiness fails, the others go on. Meanwhile nothing scores.
        engine = job.pods("rollout")[f"{job.name}-rollout-1"]
        kill_container(engine, signal.SIGSTOP)
        watching.until_firing("GRPOEnginesBelowMinimum", "GRPORewardAllEqual", timeout_seconds=240)
        kill_container(engine, signal.SIGCONT)
        tenant.shell("rm", "flat")
        watching.until_quiet("GRPOEnginesBelowMinimum", "GRPORewardAllEqual", timeout_seconds=120)
        wait_until(lambda: not missing(watching, tenant.namespace), "data for every expression", timeout_seconds=90, every_seconds=2, explain=lambda: "\n".join(missing(watching, tenant.namespace)))  # fmt: skip
        up = {
            (sample["metric"]["role"], sample["metric"]["index"])
            for sample in watching.query(f'up{{grpojob="{job.name}"}} == 1')
        }
        assert up == {("coordinator", "0"), ("trainer", "0"), ("rollout", "0"), ("rollout", "1")}
        assert not watching.query("up == 0"), "nothing is scraped that does not serve"

        # The workspace fills up.
        tenant.shell("sh", "-c", "fallocate -l $(($(df --output=avail -B1 . | tail -1) - (20 << 20))) ballast")
        watching.until_firing("GRPODiskFilling", timeout_seconds=120)
        tenant.shell("rm", "ballast")
        watching.until_quiet("GRPODiskFilling", timeout_seconds=120)

        # The coordinator hangs: it does not answer, and no step is finished.
        coordinator = job.pods("coordinator")[f"{job.name}-coordinator"]
        kill_container(coordinator, signal.SIGSTOP)
        watching.until_firing("GRPOCoordinatorUnreachable", "GRPOJobStalled", timeout_seconds=120)
        kill_container(coordinator, signal.SIGCONT)
        watching.until_quiet("GRPOCoordinatorUnreachable", "GRPOJobStalled", timeout_seconds=240)

        # The trainer dies as soon as it runs, again and again.
        for attempt in (1, 2):
            lose_the_trainer(job)
            wait_until(partial(restarted, job, attempt), f"restart {attempt}", timeout_seconds=120)
        watching.until_firing("GRPOJobRestartLoop", timeout_seconds=60)
        watching.until_quiet("GRPOJobRestartLoop", timeout_seconds=240)
        looked_at = Server(watching.url, began, time.time(), RATE_INTERVAL)
        for picture in write_pictures(looked_at, Path(os.environ.get("GRPO_PICTURES", tmp_path))):
            assert picture.stat().st_size > 10_000
    job.delete()


def restarted(job: Job, times: int) -> bool:
    """Since the last progress."""
    return int(job.status().get("budget", {}).get("counted") or 0) >= times


def lose_the_trainer(job: Job) -> None:
    """Its container, once it runs."""
    name = f"{job.name}-trainer-0"

    def running() -> bool:
        statuses = job.pods("trainer").get(name, {}).get("status", {}).get("containerStatuses", [])
        return any("running" in status["state"] for status in statuses)

    wait_until(running, f"{name} to run", timeout_seconds=120)
    kill_container(job.pods("trainer")[name])


def missing(watching: Prometheus, namespace: str) -> list[str]:
    """Expressions without data that should have some."""
    found = []
    for page in DASHBOARDS:
        for panel in page.panels:
            for legend, expression in panel.queries.items():
                asked = (
                    expression.replace("$namespace", namespace)
                    .replace("$grpojob", ".*")
                    .replace("$__rate_interval", RATE_INTERVAL)
                )
                if not watching.query(asked) and not any(part in expression for part in EMPTY):
                    found.append(f"{page.uid}, {panel.title}, {legend}: {asked}")
    return found
