"""Where a job's pods may run.

Invariant: what the document says is kept; to it come a quick farewell from dead nodes, one trainer pod a node when there are several, and
for pods with devices a distance from nodes whose hardware failed.
"""

from typing import Any

from grpo_operator.build.errors import spec_of
from grpo_operator.build.metadata import selector
from grpo_operator.facts import Job
from grpo_operator.labels import ROLE, Role
from grpo_worker.config.status import GRPOJobStatus

DEAD_NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
DEAD_NODE_SECONDS = 60  # Kubernetes' own default is 300: too long for a job that stands still meanwhile
HOSTNAME = "kubernetes.io/hostname"


def scheduling(job: Job, role: Role) -> dict[str, Any]:
    """Scheduling fields of a PodSpec, as the document asks for them."""
    spec = spec_of(job)
    wanted = spec.scheduling
    fields: dict[str, Any] = {"tolerations": _tolerations(job)}
    if wanted.node_selector:
        fields["nodeSelector"] = dict(wanted.node_selector)
    if wanted.priority_class_name:
        fields["priorityClassName"] = wanted.priority_class_name
    if wanted.scheduler_name:
        fields["schedulerName"] = wanted.scheduler_name
    if role is Role.TRAINER and spec.trainer.nodes > 1:
        others = {"matchLabels": selector(job, **{ROLE: Role.TRAINER.value})}
        rule = {"labelSelector": others, "topologyKey": HOSTNAME}
        fields["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [rule]}}
    return fields


def keep_away(spec: dict[str, Any], role: Role, status: GRPOJobStatus) -> None:
    """Add the nodes that the status excludes to the PodSpec, whatever affinity it has: terms are alternatives, so each of them gets them."""
    nodes = sorted(node.name for node in status.excluded_nodes or ())
    if not nodes or role is Role.COORDINATOR:
        return
    # The node's name, not its hostname label: the two differ on some clouds. The API takes one name a requirement.
    away = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in nodes]
    node_affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = node_affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms = required.get("nodeSelectorTerms") or [{}]
    required["nodeSelectorTerms"] = [
        {**term, "matchFields": [*(term.get("matchFields") or []), *away]} for term in terms
    ]


def _tolerations(job: Job) -> list[dict[str, Any]]:
    given = [
        toleration.model_dump(by_alias=True, mode="json", exclude_none=True)
        for toleration in spec_of(job).scheduling.tolerations
    ]
    ours = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": DEAD_NODE_SECONDS}
        for key in DEAD_NODE_TAINTS
        if not any(_covers(toleration, key) for toleration in given)
    ]
    return given + ours


def _covers(toleration: dict[str, Any], key: str) -> bool:
    """Whether a person has said how long to stay on such a node."""
    return toleration.get("key") in (key, None) and toleration.get("effect") in ("NoExecute", None)
