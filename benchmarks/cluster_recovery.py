"""Time from `kubectl apply` to training, and from each kill back to training, on a real one-node Kubernetes.

Invariant: everything is read from outside, as a person could with kubectl: pods, their containers' start times, the GRPOJob's status. The
job is examples/arithmetic.yaml with two rollout servers and a save every second step, real vLLM and FSDP on this machine's cores; on CPU most
of each time is Python importing torch and vLLM, which the parts show.

Parts, in seconds since the apply or the kill:
- noticed: the operator's status says so (a new attempt), or the old pod is gone
- pods: the new pods exist;  started: their containers run;  ready: all pods serve (rollout servers: current weights)
- step: the next step is finished

    python -m benchmarks.cluster_recovery          # needs root, as `make e2e`
"""

import calendar
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from e2e.cluster import node
from e2e.cluster.host import wait_until
from e2e.cluster.images import PROJECT_IMAGES, build_project_image, load_image
from e2e.scenarios.containers import kill_container
from e2e.scenarios.release import Release
from e2e.scenarios.training import Job, Tenant

POLL_SECONDS = 0.3
LIMIT_SECONDS = 400.0


@contextmanager
def operator() -> Iterator[Release]:
    """A node with the chart installed from this tree."""
    found = node.running()
    cluster = found or node.up()
    try:
        for name in PROJECT_IMAGES:
            build_project_image(name)
            load_image(cluster, name)
        release = Release(cluster, cluster.image("grpo-operator"), cluster.image("grpo-worker"))
        release.install()
        release.wait_ready()
        yield release
        release.uninstall()
    finally:
        if found is None:
            node.down()


def uids(job: Job, *roles: str) -> set[str]:
    return {uid for role in roles for uid in job.uids(role)}


def running(job: Job) -> bool:
    """All containers of the job's pods have started."""
    statuses = [pod["status"].get("containerStatuses", []) for pod in job.pods().values()]
    return bool(statuses) and all(s and all("running" in c["state"] for c in s) for s in statuses)


def stepped(job: Job, since: float) -> bool:
    """A step was finished after `since`, a time on the clock of the day."""
    text = (job.status().get("progress") or {}).get("lastProgressTime")
    return text is not None and calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) > since + 1


def measure(parts: dict[str, Callable[[], bool]]) -> dict[str, float]:
    """Seconds until each part holds, asked in their order from now. Raises ClusterError."""
    began = time.monotonic()
    times: dict[str, float] = {}
    for name, holds in parts.items():
        left = began + LIMIT_SECONDS - time.monotonic()
        wait_until(holds, name, timeout_seconds=left, every_seconds=POLL_SECONDS, explain=lambda: f"so far {times}")
        times[name] = round(time.monotonic() - began, 1)
    return times


def kill_set(job: Job, role: str, member: str, pods: int) -> dict[str, float]:
    """-9 to a container of the coordinator-and-trainer set."""
    attempt, before = job.status()["attempt"], uids(job, "coordinator", "trainer")
    since = time.time()
    kill_container(job.pods(role)[f"{job.name}-{member}"])
    return measure(
        {
            "noticed": lambda: job.status()["attempt"] > attempt,
            "pods": lambda: len(new := uids(job, "coordinator", "trainer")) == len(before) and not new & before,
            "started": lambda: running(job),
            "ready": lambda: job.ready() == pods,
            "step": lambda: stepped(job, since),
        }
    )


def main() -> None:
    pods = 4
    result: dict[str, Any] = {}
    with operator() as release:
        tenant = Tenant(release.cluster, release.cluster.create_namespace("bench"), release.worker_image)
        tenant.prepare()
        since = time.time()
        job = tenant.submit(
            "recovery",
            rollout={"replicas": 2},
            trainer={"testFreq": 0, "valBeforeTrain": False},
            checkpoint={"saveFreq": 2},
        )
        result["apply"] = measure(
            {
                "pods": lambda: len(job.pods()) == pods,
                "started": lambda: running(job),
                "ready": lambda: job.ready() == pods,
                "step": lambda: stepped(job, since),
            }
        )
        job.until_step(4)
        result["trainer killed -9"] = kill_set(job, "trainer", "trainer-0", pods)
        job.until_step(job.step() + 3)
        result["coordinator killed -9"] = kill_set(job, "coordinator", "coordinator", pods)
        job.until_step(job.step() + 3)

        name = f"{job.name}-rollout-1"
        old, step = job.pods("rollout")[name]["metadata"]["uid"], job.step()
        tenant.kubectl("delete", "pod", name, "--grace-period=1", "--wait=false")
        result["rollout pod deleted"] = measure(
            {
                "noticed": lambda: old not in job.uids("rollout"),
                "pods": lambda: len(job.uids("rollout")) == 2,
                "step": lambda: job.step() > step,  # on the engine that is left
                "started": lambda: running(job),
                "ready": lambda: job.ready() == pods,
            }
        )
        release.kill_operator()
        tenant.kubectl("scale", "grpojob", job.name, "--replicas=3")
        result["operator killed, then kubectl scale"] = measure({"pods": lambda: len(job.uids("rollout")) == 3})
        job.delete()
        release.cluster.delete_namespace(tenant.namespace)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
