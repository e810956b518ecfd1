"""No voluntary eviction of the pods that hold a job's state.

Invariant: `kubectl drain` waits for the coordinator and the trainers, whose loss costs the step under way; rollout pods may go, others take
over their prompts. To drain a node at once, suspend the job. Preemption and node pressure do not ask; then the job saves on SIGTERM.
"""

from typing import Any

from grpo_operator.build.errors import spec_of
from grpo_operator.build.metadata import object_meta, selector
from grpo_operator.facts import Job
from grpo_operator.labels import ROLE, Role


def disruption_budget(job: Job) -> dict[str, Any]:
    holders = {"key": ROLE, "operator": "In", "values": [Role.COORDINATOR.value, Role.TRAINER.value]}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": object_meta(job, job.name),
        "spec": {
            # A number, not maxUnavailable: for that the disruption controller would ask the GRPOJob's scale, which counts rollout pods.
            "minAvailable": 1 + spec_of(job).trainer.nodes,
            "selector": {"matchLabels": selector(job), "matchExpressions": [holders]},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
