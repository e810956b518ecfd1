"""Trainer ranks and engines that have the same devices in turn: one pod a node, whose container replaces an engine by itself."""

import json

from e2e.cluster.host import wait_until
from e2e.cluster.node import Node
from e2e.scenarios.release import Release
from e2e.scenarios.training import ENDLESS, Tenant

# The process of an engine, by what its supervisor in the container calls it.
KILL_ENGINE = "for p in /proc/[0-9]*; do if tr '\\0' '\\n' < $p/environ 2>/dev/null | grep -qx GRPO_MEMBER_NAME=rollout-1 && tr '\\0' ' ' < $p/cmdline | grep -q ' rollout '; then kill -9 ${p#/proc/}; fi; done"


def test_a_pod_that_holds_ranks_and_engines_replaces_an_engine_and_survives_a_stop(
    tenant: Tenant, release: Release, own_node: Node
) -> None:
    job = tenant.submit(
        "turns", placement="Colocated", trainer=ENDLESS | {"gpusPerNode": 2}, checkpoint={"saveFreq": 5}
    )
    job.until_step(3)
    assert sorted(job.pods()) == [f"{job.name}-coordinator", f"{job.name}-trainer-0"]
    roles = {role["name"]: role for role in job.status()["roles"]}
    assert roles["trainer"]["ready"] == roles["trainer"]["desired"] == 1
    uids = job.uids("trainer")

    tenant.kubectl("exec", f"{job.name}-trainer-0", "-c", "worker", "--", "sh", "-c", KILL_ENGINE)
    reasons = "events.jsonl"
    wait_until(
        lambda: "Died" in [e["reason"] for e in job.records(reasons)], "the engine's end told", timeout_seconds=60
    )
    killed_at = job.step()
    wait_until(
        lambda: job.metric("weight_sync/engines").get(job.step()) == 2 and job.step() > killed_at + 1,
        "both engines in service again",
        timeout_seconds=300,
    )
    assert job.uids("trainer") == uids
    assert job.status()["restarts"] == 0 and job.status()["attempt"] == 0
    (died,) = [event for event in job.records(reasons) if event["reason"] == "Died"]
    assert "rollout-1 ended (signal SIGKILL)" in died["message"]

    job.patch({"suspend": True})
    job.until_state("Suspended", 300)
    saved = job.status()["checkpoints"]["lastStep"]
    job.patch({"suspend": False})
    job.until_step(saved + 2)
    steps = [record["step"] for record in job.records("ledger.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert all(slept > 0 for slept in job.metric("timing_s/sleep").values())
    print(json.dumps(job.status()["roles"]))
    job.delete()
