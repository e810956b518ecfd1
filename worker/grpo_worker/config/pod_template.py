"""`spec.runtime.podTemplate`: strategic-merge patches onto the pods of a job.

Invariant: a patch cannot leave the namespace's isolation (host paths, host namespaces, privilege) and cannot change what the
operator finds its pods by. `forbidden_pod_settings` is the one list of that; validation and the operator both ask it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from grpo_worker.config.base import Role, Section, field

HOST_NAMESPACES = ("hostNetwork", "hostPID", "hostIPC")
OWNED = ("restartPolicy", "hostname", "subdomain")  # the operator's restarts and the processes' addresses rest on them
CONTAINER_LISTS = ("containers", "initContainers")
OWNED_LABELS = ("grpo.dev/", "app.kubernetes.io/")
# Variables by which the operator and `grpo run` tell a process what it is, where the others are and which devices it has; and of
# PYTHONPATH, whose folders come before our own packages.
OWNED_VARIABLE_PREFIX = "GRPO_"
OWNED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "JOB_COMPLETION_INDEX", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "PYTHONPATH", "RANK",
    "VLLM_CPU_KVCACHE_SPACE", "WORLD_SIZE",
)  # fmt: skip


def owns_variable(name: str) -> bool:
    return name in OWNED_VARIABLES or name.startswith(OWNED_VARIABLE_PREFIX)


def no_owned_variable(variable: str) -> str:
    """CEL: the entry `variable` of a list of environment variables is the job's to set."""
    names = ", ".join(f"'{name}'" for name in OWNED_VARIABLES)
    return f"!({variable}.name in [{names}]) && !{variable}.name.startsWith('{OWNED_VARIABLE_PREFIX}')"


_NAMED_LIST_LIMIT = 64


def _open(properties: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": properties, **rest}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "maxItems": _NAMED_LIST_LIMIT, "items": item}


_FLAG, _TEXT = {"type": "boolean"}, {"type": "string"}
_CONTAINER = _open(
    {
        "name": _TEXT,
        "securityContext": _open({"privileged": _FLAG, "allowPrivilegeEscalation": _FLAG}),
        "env": {**_list(_open({"name": {"type": "string", "maxLength": 128}}, required=["name"]))},
    },
    required=["name"],
)
_VOLUME = _open(
    {"name": _TEXT, "hostPath": {"type": "object", "properties": {"path": _TEXT, "type": _TEXT}}}, required=["name"]
)
# What the API server has to see of a PodSpec to refuse what `forbidden_pod_settings` refuses; all else is passed through.
POD_SPEC_SCHEMA: dict[str, Any] = {
    "properties": {
        **dict.fromkeys(HOST_NAMESPACES, _FLAG),
        **dict.fromkeys(OWNED, _TEXT),
        "volumes": _list(_VOLUME),
        **{kind: _list(_CONTAINER) for kind in CONTAINER_LISTS},
        "ephemeralContainers": _list({"type": "object", "properties": {"name": _TEXT}}),
    },
    "x-kubernetes-preserve-unknown-fields": True,
    "x-kubernetes-validations": [
        *(
            {
                "rule": f"!has(self.{key}) || !self.{key}",
                "message": f"{key} is refused: pods of a job stay off the host. Leave it out.",
            }
            for key in HOST_NAMESPACES
        ),
        *(
            {"rule": f"!has(self.{key})", "message": f"{key} belongs to the operator. Leave it out."}
            for key in (*OWNED, "ephemeralContainers")
        ),
        {
            "rule": "!has(self.volumes) || self.volumes.all(v, !has(v.hostPath))",
            "message": "volumes: hostPath is refused: pods of a job stay off the host. Use a claim (runtime.volumes).",
        },
        *(
            {
                "rule": f"!has(self.{kind}) || self.{kind}.all(c, !has(c.securityContext) || "
                "((!has(c.securityContext.privileged) || !c.securityContext.privileged) && "
                "(!has(c.securityContext.allowPrivilegeEscalation) || !c.securityContext.allowPrivilegeEscalation)))",
                "message": f"{kind}: privileged and allowPrivilegeEscalation are refused. Leave them out.",
            }
            for kind in CONTAINER_LISTS
        ),
        *(
            {
                "rule": f"!has(self.{kind}) || self.{kind}.all(c, !has(c.env) || c.env.all(v, {no_owned_variable('v')}))",
                "message": f"{kind}: env sets a variable that the operator sets. Leave it out.",
            }
            for kind in CONTAINER_LISTS
        ),
    ],
}
POD_LABELS_SCHEMA: dict[str, Any] = {
    "maxProperties": 64,
    "x-kubernetes-validations": [
        {
            "rule": " && ".join(f"self.all(key, !key.startsWith('{prefix}'))" for prefix in OWNED_LABELS),
            "message": f"labels of {' and '.join(OWNED_LABELS)} belong to the operator. Leave them out.",
        }
    ],
}


class PodMetadata(Section):
    """Labels and annotations that are added to a pod."""

    labels: dict[str, str] = field(
        dict, "Labels; those of grpo.dev/ and app.kubernetes.io/ are the operator's.", cluster=True, max_length=64
    )
    annotations: dict[str, str] = field(dict, "Annotations.", cluster=True)


class PodTemplate(Section):
    """A patch onto a pod."""

    metadata: PodMetadata | None = field(None, "Labels and annotations.", cluster=True)
    spec: dict[str, Any] = field(
        dict,
        "Fields of a PodSpec; containers (ours is `worker`), initContainers, volumes and env merge by name. hostPath, "
        "hostNetwork, hostPID, hostIPC and privileged are refused.",
        cluster=True,
    )


class PodTemplates(Section):
    """Patches by role; `all` comes first, the role's own wins."""

    all: PodTemplate | None = field(None, "Onto every pod.", cluster=True)
    coordinator: PodTemplate | None = field(None, "Onto the coordinator pod.", cluster=True)
    trainer: PodTemplate | None = field(None, "Onto trainer pods.", cluster=True)
    rollout: PodTemplate | None = field(None, "Onto rollout pods.", cluster=True)

    def of(self, role: Role) -> list[dict[str, Any]]:
        """The patches onto a pod of this role, `{metadata, spec}`, in the order of their application."""
        by_role = {"coordinator": self.coordinator, "trainer": self.trainer, "rollout": self.rollout}
        return [
            patch.model_dump(by_alias=True, exclude_none=True)
            for patch in (self.all, by_role[role])
            if patch is not None
        ]


def forbidden_pod_settings(template: Mapping[str, Any]) -> list[str]:
    """Paths in a pod template (`{metadata, spec}`) that a job may not set, e.g. `spec.volumes[0].hostPath`; empty when sound."""
    metadata, spec = template.get("metadata") or {}, template.get("spec") or {}
    labels = metadata.get("labels") or {}
    return [
        *(f"metadata.labels.{key}" for key in labels if str(key).startswith(OWNED_LABELS)),
        *_forbidden_in_spec(spec),
    ]


def _forbidden_in_spec(spec: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"spec.{key}" for key in HOST_NAMESPACES if spec.get(key))
    yield from (f"spec.{key}" for key in OWNED if key in spec)
    for index, volume in _items(spec, "volumes"):
        if not isinstance(volume, Mapping) or not volume.get("name"):
            yield f"spec.volumes[{index}] (has no name)"
        elif "hostPath" in volume:
            yield f"spec.volumes[{index}].hostPath"
    for kind in CONTAINER_LISTS:
        for index, container in _items(spec, kind):
            path = f"spec.{kind}[{index}]"
            if not isinstance(container, Mapping) or not container.get("name"):
                yield f"{path} (has no name)"
                continue
            security = container.get("securityContext")
            if isinstance(security, Mapping):
                yield from (
                    f"{path}.securityContext.{key}"
                    for key in ("privileged", "allowPrivilegeEscalation")
                    if security.get(key)
                )
            for place, variable in _items(container, "env"):
                if not isinstance(variable, Mapping) or not variable.get("name"):
                    yield f"{path}.env[{place}] (has no name)"
                elif owns_variable(str(variable["name"])):
                    yield f"{path}.env[{place}] ({variable['name']})"
    if "ephemeralContainers" in spec:
        yield "spec.ephemeralContainers"


def _items(spec: Mapping[str, Any], key: str) -> Iterator[tuple[int | str, Any]]:
    value = spec.get(key)
    if value is None:
        return
    yield from enumerate(value) if isinstance(value, list) else [("?", value)]
