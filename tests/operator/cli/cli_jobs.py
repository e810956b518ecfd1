"""GRPOJobs as the API server returns them, for tests of what is shown of them."""

import copy
from typing import Any

NOW = 1_790_000_000.0  # 2026-09-21T14:13:20Z

TRAINING: dict[str, Any] = {
    "apiVersion": "grpo.dev/v1alpha1",
    "kind": "GRPOJob",
    "metadata": {
        "name": "arithmetic", "namespace": "ml", "uid": "u-1", "generation": 1, "creationTimestamp": "2026-09-21T13:13:20Z",
    },
    "spec": {"suspend": False, "failurePolicy": {"maxRestarts": 3}, "rollout": {"replicas": 2}},
    "status": {
        "state": "Training",
        "message": "Step 12: updating the actor",
        "observedGeneration": 1,
        "conditions": [
            {"type": "Scheduled", "status": "True", "reason": "AllScheduled"},
            {"type": "Ready", "status": "False", "reason": "RolloutNotReady", "message": "1 of 2 rollout pods are ready"},
            {"type": "Progressing", "status": "True"},
            {"type": "CheckpointCurrent", "status": "True"},
            {"type": "Restarting", "status": "False"},
            {"type": "Suspended", "status": "False"},
            {"type": "Succeeded", "status": "False"},
            {"type": "Failed", "status": "False"},
        ],
        "attempt": 1,
        "restarts": 1,
        "uncountedRestarts": 2,
        "budget": {"counted": 1, "uncounted": 0},
        "progress": {
            "step": 12, "totalSteps": 80, "epoch": 0.3, "totalEpochs": 2, "reward": 0.4125, "accuracy": 0.53,
            "policyVersion": 12, "rolloutVersion": 11, "etaSeconds": 200, "tokensPerSecond": 1834.2,
            "lastProgressTime": "2026-09-21T14:13:00Z",
        },
        "checkpoints": {
            "lastStep": 10, "path": "/workspace/runs/arithmetic/checkpoints/epoch_0_step_10", "time": "2026-09-21T14:12:40Z",
            "kept": [{"step": 5}, {"step": 10}],
        },
        "roles": [
            {"name": "coordinator", "desired": 1, "ready": 1, "restarts": 1},
            {"name": "trainer", "desired": 1, "ready": 1, "restarts": 1},
            {"name": "rollout", "desired": 2, "ready": 1, "restarts": 0},
        ],
        "summary": {"trainers": "1/1", "rollouts": "1/2"},
        "failures": [
            {
                "time": "2026-09-21T14:10:00Z", "pod": "arithmetic-trainer-0", "podUID": "p-1", "role": "trainer", "exitCode": 85,
                "reason": "DeviceFailed", "message": "CUDA error: uncorrectable ECC\nmore", "action": "RestartSet", "counted": True,
            }
        ],
        "startTime": "2026-09-21T13:13:30Z",
    },
}  # fmt: skip


def job(**changes: Any) -> dict[str, Any]:
    """`TRAINING` with parts of its status replaced."""
    document = copy.deepcopy(TRAINING)
    document["status"].update(changes)
    return document


def with_condition(
    document: dict[str, Any], kind: str, status: str, reason: str = "", message: str = ""
) -> dict[str, Any]:
    """The job with one condition set."""
    document = copy.deepcopy(document)
    others = [entry for entry in document["status"]["conditions"] if entry["type"] != kind]
    document["status"]["conditions"] = [*others, {"type": kind, "status": status, "reason": reason, "message": message}]
    return document


def new_job() -> dict[str, Any]:
    """A job that no operator has looked at."""
    document = copy.deepcopy(TRAINING)
    del document["status"]
    return document


def suspended() -> dict[str, Any]:
    document = with_condition(job(state="Suspended"), "Suspended", "True", "Suspended", "All pods are gone")
    document["spec"]["suspend"] = True
    return document
