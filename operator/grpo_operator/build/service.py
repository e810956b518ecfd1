"""The headless Service that gives each pod of a job a name in DNS.

Invariant: a pod's name resolves as soon as it has an address, ready or not: trainers meet, and workers register, before anything is ready.
"""

from typing import Any

from grpo_operator.build.metadata import object_meta, selector
from grpo_operator.build.ports import ports_of
from grpo_operator.facts import Job
from grpo_operator.labels import Role, member_name, service_name


def service(job: Job) -> dict[str, Any]:
    ports = ports_of(job)
    # A Service has each number and each name once; servers of different pods may share a number, a colocated node's pod has engines' too.
    names: dict[int, str] = {}
    for role in Role:
        for name, port in ports.of_role(role).items():
            names.setdefault(port, name)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": object_meta(job, service_name(job.name)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(job),
            "ports": [
                {"name": name, "port": port, "targetPort": port, "protocol": "TCP"} for port, name in names.items()
            ],
        },
    }


def host(job: Job, role: Role, index: int) -> str:
    """DNS name of a pod, in any cluster domain."""
    return f"{member_name(role, index)}.{service_name(job.name)}.{job.namespace}.svc"
