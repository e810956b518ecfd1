"""What a job consists of on a cluster, as manifests: pure functions from a job to plain dictionaries.

Invariant: the same job, status and settings give the same manifests, whoever asks and however often; nothing here talks to the API
server. A job that cannot be built raises `CannotBuild` from `check`, before anything of it exists.
"""

from typing import Any

from grpo_operator.build.config import config_hash, config_map, config_map_name
from grpo_operator.build.disruption_budget import disruption_budget
from grpo_operator.build.errors import CannotBuild
from grpo_operator.build.network_policy import network_policy
from grpo_operator.build.pods import pod
from grpo_operator.build.ports import Ports, ports_of
from grpo_operator.build.secret import token_secret
from grpo_operator.build.service import service
from grpo_operator.facts import Job
from grpo_operator.labels import Role
from grpo_operator.settings import Settings
from grpo_worker.config.status import GRPOJobStatus

__all__ = [
    "CannotBuild",
    "Ports",
    "check",
    "config_hash",
    "config_map_name",
    "coordinator_port",
    "pod",
    "ports_of",
    "problem",
    "shared",
]


def shared(job: Job, settings: Settings, token: str) -> list[dict[str, Any]]:
    """Everything but the pods, to be applied before the first of them. `token` is the job's."""
    return [
        service(job),
        config_map(job),
        token_secret(job, token),
        network_policy(job, settings),
        disruption_budget(job),
    ]


def coordinator_port(job: Job) -> int:
    """Where the coordinator's `/status` is."""
    return ports_of(job).coordinator


def check(job: Job, settings: Settings) -> None:
    """Build every kind of pod once and throw it away. Raises CannotBuild with the field to change."""
    for role in Role:
        pod(job, role, 0, GRPOJobStatus(), settings)


def problem(job: Job, settings: Settings) -> str:
    """Why the job can never have pods; '' when it can."""
    try:
        check(job, settings)
    except CannotBuild as error:
        return str(error)
    return ""
