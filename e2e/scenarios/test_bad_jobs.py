"""Jobs that cannot work end in the state and with the words that docs/cluster.md promises."""

from typing import Any

import pytest
from e2e.cluster.errors import ClusterError
from e2e.cluster.host import wait_until
from e2e.cluster.node import Node
from e2e.scenarios.training import Job, Tenant

HANGING = "import time\n\ndef score(*arguments, **keywords):\n    time.sleep(3600)\n"
NO_PATIENCE = {"startupTimeoutSeconds": 20, "maxRestarts": 1, "backoffSeconds": 1}


def failed(job: Job, timeout_seconds: float = 300) -> dict[str, Any]:
    """Wait for its end as Failed; its condition."""
    wait_until(lambda: job.status().get("state") == "Failed", f"{job.name} to fail", timeout_seconds=timeout_seconds)
    condition = job.condition("Failed")
    print(f"{job.name}: {condition['reason']}: {condition['message']}")
    assert job.condition("Succeeded")["status"] == "False"
    return condition


def test_a_wrong_column_is_named_with_its_file(tenant: Tenant) -> None:
    job = tenant.submit("column", data={"rewardKey": "Reward"})
    condition = failed(job)
    assert condition["reason"] == "InvalidData", condition
    assert "data.trainFiles[0]: train.parquet has no column 'Reward'" in condition["message"], condition
    failure = job.status()["failures"][0]
    assert failure["exitCode"] == 65 and failure["action"] == "FailJob"
    assert job.status()["restarts"] == 0
    job.delete()


def test_more_gpus_than_there_are_gives_everything_back_and_says_so(tenant: Tenant, own_node: Node) -> None:
    own_node.set_gpus(2)
    # The node's GPUs are faked, so engines that asked for one would say that there is none: these begin on its CPU, and give that back.
    engines = {"rollout": {"limits": {"nvidia.com/gpu": "0"}}}
    job = tenant.submit(
        "greedy",
        runtime={"device": "auto", "resources": engines},
        trainer={"gpusPerNode": 8},
        failurePolicy=NO_PATIENCE,
    )
    job.until(lambda status: "nvidia.com/gpu" in (status.get("message") or ""), "the scheduler's words", 60)
    condition = failed(job)
    assert condition["reason"] == "Unschedulable", condition
    assert "Insufficient nvidia.com/gpu" in condition["message"] and "trainer.gpusPerNode" in condition["message"]
    wait_until(
        lambda: not [pod for pod in job.pods().values() if pod["status"]["phase"] in ("Pending", "Running")],
        "its pods to go",
        timeout_seconds=60,
    )
    job.delete()


def test_an_image_that_cannot_be_pulled_is_named(tenant: Tenant) -> None:
    job = tenant.submit("imageless", runtime={"image": "localhost/no-such-image:1"}, failurePolicy=NO_PATIENCE)
    condition = failed(job)
    assert condition["reason"] == "ImagePullFailed", condition
    assert "localhost/no-such-image:1" in condition["message"]
    job.delete()


def test_an_engine_that_is_killed_for_its_memory_is_told_what_to_raise(tenant: Tenant) -> None:
    limits = {"rollout": {"limits": {"memory": "300Mi"}}}
    job = tenant.submit("memory", runtime={"resources": limits}, failurePolicy={"maxRestarts": 1, "backoffSeconds": 1})
    condition = failed(job)
    assert condition["reason"] == "OOMKilled", condition
    for words in ("runtime.resources.rollout.limits.memory (now 300Mi)", "gpuMemoryUtilization", "shmSize"):
        assert words in condition["message"], condition
    failure = job.status()["failures"][0]
    assert failure["role"] == "rollout" and failure["exitCode"] == 137
    job.delete()


def test_a_reward_that_hangs_is_cut_off_and_ends_the_job(tenant: Tenant) -> None:
    tenant.write("hanging.py", HANGING)
    job = tenant.submit(
        "hanging",
        reward={"function": "hanging.py:score", "timeoutSeconds": 1, "options": {}},
        trainer={"valBeforeTrain": False, "testFreq": 0},
        data={"trainBatchSize": 4},
        actor={"ppoMiniBatchSize": 4},
        rollout={"n": 2},
    )
    condition = failed(job)
    assert condition["reason"] == "RewardTimeout" and "hanging.py:score" in condition["message"], condition
    job.delete()


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"rollout": {"n": 1}}, "rollout.n"),
        ({"actor": {"ppoMiniBatchSize": 7}}, "actor.ppoMiniBatchSize"),
        ({"rollout": {"temprature": 0.5}}, "temprature"),
    ],
)
def test_a_contradiction_is_refused_by_kubectl_apply(tenant: Tenant, patch: dict[str, Any], words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        tenant.submit("refused", **patch)
