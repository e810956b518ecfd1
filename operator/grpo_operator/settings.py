"""What the operator was told at its start and every part of it may need.

Invariant: immutable, and free of Kubernetes objects: the pure parts take it as an argument.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The command line of `python -m grpo_operator`, resolved."""

    worker_image: str  # of jobs that name none
    worker_image_pull_policy: str = "IfNotPresent"
    namespaces: tuple[str, ...] = ()  # watched; empty: all
    operator_namespace: str = "grpo-system"  # job NetworkPolicies admit the operator from here
    metrics_namespaces: tuple[str, ...] = ()  # may scrape the pods of jobs
    scrape_annotations: bool = False  # on the pods of jobs, for a Prometheus without PodMonitors
    metrics_port: int = 8080
    lease_namespace: str = "grpo-system"
    lease_name: str = "grpo-operator"
    workers: int = 8  # reconciles at a time
    poll_seconds: float = 3.0  # between two questions for a coordinator's /status
    resync_seconds: float = 300.0  # every job is reconciled at least so often
