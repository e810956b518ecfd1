"""The environment that a document asks for, on one machine.

Invariant: what a Secret or ConfigMap holds on a cluster is the variable of the same name here, in the environment of `grpo run`; one that
is not there is refused by its name, never passed on empty.
"""

from collections.abc import Mapping

from grpo_worker.config import Spec
from grpo_worker.errors import UsageError


def document_variables(spec: Spec, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables of the job's processes, beside the `inherited` ones. Raises UsageError for one that is to be inherited and is not there."""
    missing = [v.name for v in spec.runtime.env if v.value_from is not None and v.name not in inherited]
    if missing:
        raise UsageError(
            f"spec.runtime.env: {', '.join(missing)}: valueFrom reads a Secret or ConfigMap on a cluster, and the variable of the same "
            f"name under `grpo run`, which is not set. In the shell that starts it: export {missing[0]}=..."
        )
    variables = {} if "NCCL_DEBUG" in inherited else {"NCCL_DEBUG": "WARN"}
    if interface := spec.network.socket_interface:
        variables |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return variables | {v.name: v.value or "" for v in spec.runtime.env if v.value_from is None}
