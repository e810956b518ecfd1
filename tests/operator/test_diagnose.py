"""From the way a pod ended to what a person should change."""

import pytest
from plan_world import START, document

from grpo_operator.facts import Ended, LastWord, Pod, Waiting
from grpo_operator.labels import Role
from grpo_operator.planning import diagnose
from grpo_worker.config import job_from_document

SPEC = job_from_document(
    document(
        runtime={
            "device": "cpu",
            "workspace": {"claimName": "w"},
            "resources": {"rollout": {"limits": {"memory": "4Gi"}}},
        }
    )
).spec


def pod(role: Role, **facts: object) -> Pod:
    return Pod(f"demo-{role.value}-0", "uid", role, 0, 0, START, "Failed", **facts)  # type: ignore[arg-type]


def ended(
    role: Role, code: int | None, kube: str = "Error", said: tuple[str, str] | None = None, message: str = ""
) -> Pod:
    return pod(role, ended=Ended(code, kube, START, LastWord(*said) if said else None, message))


MISSING = "data.trainFiles[0]: train.parquet has no column 'reward' (columns: prompt, Response). Rename it, or set data.rewardKey."


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        (ended(Role.ROLLOUT, 137, "OOMKilled"), "OOMKilled",
         ["rollout.gpuMemoryUtilization", "rollout.cpuKVCacheGiB", "runtime.shmSize", "runtime.resources.rollout.limits.memory (now 4Gi)"]),
        (ended(Role.TRAINER, 137, "OOMKilled"), "OOMKilled",
         ["actor.ppoMaxTokenLenPerGPU", "paramOffload", "optimizerOffload", "runtime.resources.trainer.limits.memory (now none)"]),
        (ended(Role.COORDINATOR, 137, "OOMKilled"), "OOMKilled", ["reward.workers", "runtime.resources.coordinator.limits.memory"]),
        (ended(Role.COORDINATOR, 65, said=("InvalidData", MISSING)), "InvalidData", [MISSING]),
        (ended(Role.ROLLOUT, 70, said=("UnexpectedError", "OSError: [Errno 98] Address already in use")), "PortConflict", ["network.*Port"]),
        (ended(Role.TRAINER, 70, said=("UnexpectedError", "torch.OutOfMemoryError: CUDA out of memory. Tried")), "OutOfMemory",
         ["actor.ppoMaxTokenLenPerGPU", "rollout.gpuMemoryUtilization"]),
        (ended(Role.TRAINER, 85, said=("DeviceFailed", "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL")), "NCCLTimeout",
         ["network.socketInterface", "NCCL_DEBUG", "trainer.processGroupTimeoutSeconds"]),
        (ended(Role.COORDINATOR, 65, said=("InvalidData", "reward.function: 8 of 8 samples could not be scored. The last one: no result within 5 s (reward.timeoutSeconds)")),
         "RewardTimeout", ["reward.timeoutSeconds", "hangs"]),
        (ended(Role.ROLLOUT, 137, message="step 6\nweights of version 6 are in"), "Killed", ["kubectl describe pod"]),
        (ended(Role.TRAINER, 1, message="a\nb\nc\nd\ne"), "UnexpectedError", ["ended with exit code 1: c d e"]),
        (ended(Role.ROLLOUT, 137), "Killed", ["kubectl describe pod demo-rollout-0", "limits.memory"]),
        (ended(Role.ROLLOUT, None, "Evicted", message="The node was low on resource: memory."), "Evicted", ["low on resource"]),
        (ended(Role.TRAINER, 70, said=("UnexpectedError", "KeyError: 'x'")), "UnexpectedError", ["KeyError: 'x'", "70"]),
        (ended(Role.TRAINER, 3), "UnexpectedError", ["exit code 3", "kubectl logs demo-trainer-0"]),
        (ended(Role.TRAINER, None, "UnexpectedAdmissionError", message="no healthy devices"), "UnexpectedAdmissionError", ["never ran", "no healthy devices"]),
        (ended(Role.ROLLOUT, 0, "Completed", said=("Completed", "")), "Ended", ["while the job goes on"]),
        (pod(Role.ROLLOUT, node="node-a"), "NodeLost", ["node-a"]),
    ],
)  # fmt: skip
def test_the_end_of_a_pod(pod: Pod, reason: str, words: list[str]) -> None:
    found = diagnose.ended(pod, SPEC)
    assert found.reason == reason
    for word in words:
        assert word in found.message


GPUS = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        (pod(Role.TRAINER, unschedulable=GPUS), "Unschedulable", [GPUS, "trainer.gpusPerNode (1)", "3 GPUs in all", "add nodes"]),
        (pod(Role.ROLLOUT, unschedulable=GPUS), "Unschedulable", ["rollout.tensorParallelSize (1)", "rollout.replicas (2)"]),
        (pod(Role.ROLLOUT, unschedulable="0/1 nodes are available: 1 Insufficient memory."), "Unschedulable", ["runtime.resources.rollout.requests"]),
        (pod(Role.ROLLOUT, unschedulable='persistentvolumeclaim "work" not found'), "Unschedulable", ["runtime.workspace"]),
        (pod(Role.ROLLOUT, unschedulable="1 node(s) had untolerated taint {a: b}"), "Unschedulable", ["scheduling.tolerations"]),
        (pod(Role.ROLLOUT, waiting=Waiting("ImagePullBackOff", "Back-off pulling image x")), "ImagePullFailed", ["runtime.image", "Back-off pulling image x"]),
        (pod(Role.ROLLOUT, waiting=Waiting("InvalidImageName", "couldn't parse")), "InvalidImageName", ["Correct runtime.image"]),
        (pod(Role.ROLLOUT, waiting=Waiting("CreateContainerConfigError", 'secret "hf" not found')), "CreateContainerConfigError", ["runtime.env", "hf"]),
        (pod(Role.ROLLOUT, waiting=Waiting("ContainerCreating", "")), None, []),
        (pod(Role.ROLLOUT), None, []),
        (pod(Role.ROLLOUT, started=True, unschedulable=GPUS), None, []),
    ],
)  # fmt: skip
def test_a_pod_that_does_not_start(pod: Pod, reason: str | None, words: list[str]) -> None:
    found = diagnose.not_started(pod, SPEC)
    assert (found.reason if found is not None else None) == reason
    for word in words:
        assert found is not None and word in found.message


def test_a_long_last_word_does_not_push_the_advice_out() -> None:
    found = diagnose.ended(ended(Role.TRAINER, 70, said=("UnexpectedError", "CUDA out of memory " + "x" * 5000)), SPEC)
    assert len(found.message) < 1600 and "ppoMaxTokenLenPerGPU" in found.message
