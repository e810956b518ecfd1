"""What a pod asks its node for: GPUs from the document's layout, RDMA devices, and what the document says by role.

Invariant: a number in `runtime.resources` wins over ours; the coordinator never asks for a device.
"""

import math
from decimal import Decimal, InvalidOperation
from typing import Any

from grpo_operator.labels import Role
from grpo_worker.config import Spec
from grpo_worker.config.base import Role as DocumentRole

GPU = "nvidia.com/gpu"
SUFFIXES = {"m": Decimal("0.001"), "k": Decimal(1000)}


def resources(spec: Spec, role: Role) -> dict[str, dict[str, str]]:
    """`requests` and `limits` of the worker container."""
    asked = spec.runtime.resources.of(document_role(role))
    limits = {**devices(spec, role), **asked.limits}
    wanted = {"requests": dict(asked.requests), "limits": limits}
    return {key: values for key, values in wanted.items() if values}


def document_role(role: Role) -> DocumentRole:
    """The role as the document's models type it."""
    return role.value


def devices(spec: Spec, role: Role) -> dict[str, str]:
    """Extended resources of one pod."""
    if role is Role.COORDINATOR:
        return {}
    wanted: dict[str, str] = {}
    if spec.runtime.device != "cpu":
        wanted[GPU] = str(spec.trainer.gpus_per_node if role is Role.TRAINER else spec.rollout.tensor_parallel_size)
    if rdma := spec.network.rdma:
        wanted[rdma.resource] = str(rdma.count)
    return wanted


def gpus(spec: Spec, role: Role) -> int:
    """That one pod asks for."""
    return int(cores(resources(spec, role).get("limits", {}).get(GPU, "0")))


def asks_for_gpus(spec: Spec) -> bool:
    """Whether every pod that computes gets GPUs."""
    roles = [Role.TRAINER] + [Role.ROLLOUT] * (spec.rollout_pods > 0)
    return all(gpus(spec, role) > 0 for role in roles)


def capabilities(spec: Spec, role: Role) -> dict[str, list[str]]:
    """RDMA pins memory, for which the container needs IPC_LOCK; a namespace must not enforce Pod Security above `privileged` then."""
    if spec.network.rdma and role is not Role.COORDINATOR:
        return {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    return {"drop": ["ALL"]}


def threads(spec: Spec, role: Role) -> int | None:
    """CPU threads of each process in the pod; None when nobody said how many cores it has."""
    if role is Role.COORDINATOR:
        return 1
    if spec.runtime.cpu_threads:
        return spec.runtime.cpu_threads
    asked = spec.runtime.resources.of(document_role(role))
    quantity = asked.limits.get("cpu") or asked.requests.get("cpu")
    # Colocated engines work in turn with the ranks of their pod.
    processes = spec.trainer.gpus_per_node if role is Role.TRAINER else 1
    return max(1, math.floor(cores(quantity) / processes)) if quantity else None


def cores(quantity: Any) -> Decimal:
    """`2`, `1.5` and `500m` in cores."""
    text = str(quantity)
    factor = SUFFIXES.get(text[-1:], Decimal(1))
    try:
        return Decimal(text if factor == 1 else text[:-1]) * factor
    except InvalidOperation:
        return Decimal(1)  # the API server refuses what is no quantity
