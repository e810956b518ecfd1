"""The environment that a document asks for, on one machine.

Invariant: what only a cluster can resolve is refused by its name, never passed on empty.
"""

from collections.abc import Mapping

from grpo_worker.config import Spec
from grpo_worker.errors import UsageError


def document_variables(spec: Spec, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables of the job's processes, beside the `inherited` ones. Raises UsageError for a value that a cluster holds."""
    held = [variable.name for variable in spec.runtime.env if variable.value_from is not None]
    if held:
        raise UsageError(
            f"spec.runtime.env: {', '.join(held)}: valueFrom reads a Secret or ConfigMap, and `grpo run` has no cluster. "
            "Give the variable a value in the document, or leave it out of the document and export it in the shell."
        )
    variables = {} if "NCCL_DEBUG" in inherited else {"NCCL_DEBUG": "WARN"}
    if interface := spec.network.socket_interface:
        variables |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return variables | {variable.name: variable.value or "" for variable in spec.runtime.env}
