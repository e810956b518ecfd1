"""Who may open a connection to a job's pods.

Invariant: the job's own pods on any port (NCCL and Gloo choose theirs), the operator on the coordinator's port, metrics scrapers on the
ports that serve `/metrics`, and nobody else; a job of the same namespace is somebody else. What pods may reach stays open: models,
data and loggers are anywhere.
"""

from typing import Any

from grpo_operator.build.metadata import object_meta, selector
from grpo_operator.build.ports import ports_of
from grpo_operator.facts import Job
from grpo_operator.labels import APP_NAME, MANAGER
from grpo_operator.settings import Settings

NAMESPACE = "kubernetes.io/metadata.name"  # the API server sets it on every namespace


def network_policy(job: Job, settings: Settings) -> dict[str, Any]:
    ports = ports_of(job)
    ingress: list[dict[str, Any]] = [
        {"from": [{"podSelector": {"matchLabels": selector(job)}}]},
        {
            "from": [
                {
                    "namespaceSelector": {"matchLabels": {NAMESPACE: settings.operator_namespace}},
                    "podSelector": {"matchLabels": {APP_NAME: MANAGER}},
                }
            ],
            "ports": _tcp(ports.coordinator),
        },
    ]
    if settings.metrics_namespaces:
        namespaces = {"key": NAMESPACE, "operator": "In", "values": list(settings.metrics_namespaces)}
        ingress.append(
            {
                "from": [{"namespaceSelector": {"matchExpressions": [namespaces]}}],
                "ports": _tcp(*sorted({ports.coordinator, ports.trainer, *ports.engines})),
            }
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": object_meta(job, job.name),
        "spec": {"podSelector": {"matchLabels": selector(job)}, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _tcp(*ports: int) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port} for port in ports]
