"""`runtime.podTemplate`: strategic-merge patches onto the pods that we would make.

Invariant: mappings merge, lists of things with names merge by name, other lists are replaced, null removes a key (as the API server's
strategic merge patch does). What a patch may not set is refused here again, though the document's validation has refused it already.
"""

from collections.abc import Mapping
from typing import Any

from grpo_operator.build.errors import CannotBuild
from grpo_operator.build.resources import document_role
from grpo_operator.labels import Role
from grpo_worker.config import Spec
from grpo_worker.config.pod_template import forbidden_pod_settings

# Merge keys of the lists in a PodSpec, as `patchMergeKey` in k8s.io/api/core/v1; a list that is not here is replaced whole.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}


def patched(pod: dict[str, Any], spec: Spec, role: Role) -> dict[str, Any]:
    """The pod with the job's patches: first the one for all roles, then the role's. Raises CannotBuild."""
    for patch in spec.runtime.pod_template.of(document_role(role)):
        try:
            _refuse(patch, "runtime.podTemplate")
            pod = merge(pod, patch)
        except (TypeError, AttributeError) as error:  # the document's schema leaves most of a PodSpec open
            raise CannotBuild(
                f"runtime.podTemplate: this is no patch of a pod: {error}. See `kubectl explain pod.spec`."
            ) from error
    return pod


def merge(base: Any, patch: Any, key: str = "") -> Any:
    """`patch` onto `base`; `key` is the field that holds them."""
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        result = {name: value for name, value in base.items() if name not in patch or patch[name] is not None}
        for name, value in patch.items():
            if value is not None:
                result[name] = merge(result.get(name), value, name)
        return result
    name = MERGE_KEYS.get(key)
    if isinstance(base, list) and isinstance(patch, list) and name:
        return _merge_list(base, patch, name)
    return patch


def _merge_list(base: list[Any], patch: list[Any], name: str) -> list[Any]:
    result = list(base)
    places = {item.get(name): place for place, item in enumerate(result) if isinstance(item, Mapping)}
    for item in patch:
        place = places.get(item.get(name)) if isinstance(item, Mapping) else None
        if place is None:
            result.append(item)
        elif name == "name" and _other_source(result[place], item):
            result[place] = item
        else:
            result[place] = merge(result[place], item)
    return result


def _other_source(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """A variable or volume can have one source only: a new one replaces the entry."""
    variable = {"value", "valueFrom"}
    if set(old) - {"name"} <= variable and set(new) - {"name"} <= variable:
        return True
    one_of = {
        "emptyDir",
        "configMap",
        "secret",
        "persistentVolumeClaim",
        "projected",
        "csi",
        "ephemeral",
        "nfs",
        "image",
    }
    return bool(one_of & set(old)) and bool(one_of & set(new)) and (one_of & set(old)) != (one_of & set(new))


def _refuse(patch: Mapping[str, Any], field: str) -> None:
    if forbidden := forbidden_pod_settings(patch):
        raise CannotBuild(f"{field}.{forbidden[0]}: a job may not set this. Remove it.")
