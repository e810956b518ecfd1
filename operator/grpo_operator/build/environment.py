"""The environment of a worker process in a pod.

Invariant: a person's variables win over our defaults; the names by which the operator tells a process what it is are refused with the
document (`config.pod_template.owns_variable`). Every cache that a library keeps is in a directory that can be written.
"""

from datetime import datetime
from typing import Any

from grpo_operator.build.errors import spec_of
from grpo_operator.build.ports import ports_of
from grpo_operator.build.resources import threads
from grpo_operator.build.secret import KEY
from grpo_operator.build.service import host
from grpo_operator.build.volumes import HOME, TEMPORARY, WORKSPACE
from grpo_operator.facts import Job
from grpo_operator.labels import Role, member_name, token_secret_name
from grpo_worker import environment as names
from grpo_worker import logs
from grpo_worker.config.runtime import EnvFromSource, EnvVar
from grpo_worker.config.status import GRPOJobStatus

TERMINATION_LOG_PATH = "/dev/termination-log"


def environment(job: Job, role: Role, index: int, status: GRPOJobStatus) -> list[dict[str, Any]]:
    """Entries of `env`, unique by name."""
    entries = _defaults(job, role)
    for variable in spec_of(job).runtime.env:
        entries[variable.name] = _entry(variable)
    entries |= _identity(job, role, index, status)
    return list(entries.values())


def environment_from(job: Job) -> list[dict[str, Any]]:
    """Entries of `envFrom`; `env` wins over them."""
    return [_source(source) for source in spec_of(job).runtime.env_from]


def resumes(status: GRPOJobStatus) -> bool:
    """Whether a new set goes on from the newest checkpoint whatever `checkpoint.resume` says: it is not the job's first, and the job has
    saved one of its own. (Before that, `checkpoint.resume` speaks of checkpoints that the job found at its start.)"""
    if not status.attempt or status.checkpoints is None or status.checkpoints.last_step is None:
        return False
    saved, started = _time(status.checkpoints.time), _time(status.start_time)
    return saved is None or started is None or saved >= started


def _defaults(job: Job, role: Role) -> dict[str, dict[str, Any]]:
    """What a person may want otherwise."""
    spec = spec_of(job)
    cache = f"{HOME}/.cache"
    values = {
        "HOME": HOME,
        "USER": "grpo",  # torch asks for the user's name, and an image of one's own may not know our user id
        "LOGNAME": "grpo",
        "TMPDIR": TEMPORARY,
        "XDG_CACHE_HOME": cache,
        "HF_HOME": f"{WORKSPACE}/.cache/huggingface",  # shared: one pod downloads a model, the others find it
        "MPLCONFIGDIR": f"{cache}/matplotlib",
        "NUMBA_CACHE_DIR": f"{cache}/numba",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torchinductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "VLLM_CACHE_ROOT": f"{cache}/vllm",
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep: other pods of the node want the cores
    }
    if number := threads(spec, role):
        values["OMP_NUM_THREADS"] = str(number)
    if role is not Role.COORDINATOR:
        values["NCCL_DEBUG"] = "WARN"
        if interface := spec.network.socket_interface:
            values |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return {name: {"name": name, "value": value} for name, value in values.items()}


def _identity(job: Job, role: Role, index: int, status: GRPOJobStatus) -> dict[str, dict[str, Any]]:
    """What this process is, and where the others are."""
    spec, ports = spec_of(job), ports_of(job)
    values = {
        names.RUN_DIRECTORY: f"{WORKSPACE}/runs/{job.name}",
        names.COORDINATOR_URL: f"http://{host(job, Role.COORDINATOR, 0)}:{ports.coordinator}",
        names.LISTEN_HOST: "0.0.0.0",
        names.MEMBER_NAME: member_name(role, index),
        names.TERMINATION_LOG: TERMINATION_LOG_PATH,
        names.DEVICE_COUNT: str(spec.devices),
        names.ATTEMPT: str(status.attempt or 0),
        names.LOG_FORMAT: logs.JSON,
    }
    if role is Role.COORDINATOR:
        values[names.COORDINATOR_PORT] = str(ports.coordinator)
        if resumes(status):
            values[names.RESUME] = "auto"
    elif role is Role.TRAINER:
        values |= {
            "NODE_RANK": str(index),
            "MASTER_ADDR": host(job, Role.TRAINER, 0),
            "MASTER_PORT": str(ports.rendezvous),
        }
        if spec.colocated:
            values[names.ROLLOUT_PORT] = str(ports.rollout)  # of the node's first engine
    else:
        values |= {names.REPLICA_INDEX: str(index), names.ROLLOUT_PORT: str(ports.rollout)}
    token = {"secretKeyRef": {"name": token_secret_name(job.name), "key": KEY}}
    address = {"fieldRef": {"fieldPath": "status.podIP"}}
    return {
        **{name: {"name": name, "value": value} for name, value in values.items()},
        names.JOB_TOKEN: {"name": names.JOB_TOKEN, "valueFrom": token},
        names.ADVERTISED_HOST: {"name": names.ADVERTISED_HOST, "valueFrom": address},
    }


def _entry(variable: EnvVar) -> dict[str, Any]:
    if variable.value_from is not None:
        return {
            "name": variable.name,
            "valueFrom": variable.value_from.model_dump(by_alias=True, mode="json", exclude_none=True),
        }
    return {"name": variable.name, "value": variable.value or ""}


def _source(source: EnvFromSource) -> dict[str, Any]:
    return source.model_dump(by_alias=True, mode="json", exclude_none=True)


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
