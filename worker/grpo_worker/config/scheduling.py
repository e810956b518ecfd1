"""`spec.scheduling`: which nodes the pods of a job may run on, and how urgent they are."""

from typing import Literal

from grpo_worker.config.base import Section, field


class Toleration(Section):
    """Lets pods run on nodes with a matching taint."""

    key: str | None = field(
        None, "Key of the taint; without one, operator Exists matches all.", min_length=1, max_length=317
    )
    operator: Literal["Exists", "Equal"] | None = field(None, "How key and value match; Kubernetes takes Equal.")
    value: str | None = field(None, "Value of the taint.", max_length=63)
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = field(
        None, "Effect of the taint; default any."
    )
    toleration_seconds: int | None = field(
        None, "How long pods stay on a node with a NoExecute taint; default for ever.", unit="seconds", ge=0
    )


class Scheduling(Section):
    """Where pods may run."""

    node_selector: dict[str, str] = field(dict, "Labels that a node has to have.", cluster=True)
    tolerations: list[Toleration] = field(list, "Taints that pods tolerate.", cluster=True, max_length=32)
    priority_class_name: str | None = field(
        None, "PriorityClass of the pods.", cluster=True, min_length=1, max_length=253
    )
    scheduler_name: str | None = field(
        None, "Scheduler of the pods; default the cluster's.", cluster=True, min_length=1, max_length=253
    )
