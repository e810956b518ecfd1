"""A job as the operator holds it, from a few fields of a document, and the manifests that come of it."""

from typing import Any

from grpo_operator import build
from grpo_operator.control.read_job import read_job
from grpo_operator.facts import Job
from grpo_operator.labels import Role
from grpo_operator.settings import Settings
from grpo_worker.config.status import GRPOJobStatus

SETTINGS = Settings(worker_image="registry.example/grpo-worker:1", operator_namespace="grpo-system")
TOKEN = "a-token"


def job_of(spec: dict[str, Any] | None = None, *, workspace: bool = True, check: bool = True) -> Job:
    """A sound job with these sections of `spec` laid over it."""
    base: dict[str, Any] = {
        "model": {"path": "demo/model"},
        "data": {"trainFiles": ["demo/train.parquet"]},
        "reward": {"function": "gsm8k"},
    }
    if workspace:
        base["runtime"] = {"workspace": {"claimName": "work"}}
    for name, section in (spec or {}).items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    job = read_job(
        {
            "apiVersion": "grpo.dev/v1alpha1",
            "kind": "GRPOJob",
            "metadata": {"name": "demo", "namespace": "team", "uid": "uid-1", "generation": 1},
            "spec": base,
        }
    )
    assert not check or not job.invalid, job.invalid
    return job


def pod_of(
    spec: dict[str, Any] | None = None, role: Role = Role.TRAINER, index: int = 0, status: GRPOJobStatus | None = None
) -> dict[str, Any]:
    return build.pod(job_of(spec), role, index, status or GRPOJobStatus(), SETTINGS)


def worker_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = [one for one in pod["spec"]["containers"] if one["name"] == "worker"]
    return container


def env_of(pod: dict[str, Any]) -> dict[str, Any]:
    """Variables by name: the value, or where it comes from."""
    entries = worker_of(pod)["env"]
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}


def shared_of(kind: str, spec: dict[str, Any] | None = None, settings: Settings = SETTINGS) -> dict[str, Any]:
    (found,) = [one for one in build.shared(job_of(spec), settings, TOKEN) if one["kind"] == kind]
    return found
