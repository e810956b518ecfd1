"""Metadata that every child of a job has.

Invariant: a child carries the job's UID as owner and as label: the garbage collector removes it with the job, and a new job of the same
name never takes an old one's child for its own. No finalizers: nothing of a job lives outside the API server.
"""

from typing import Any

from grpo_operator.facts import Job
from grpo_operator.labels import JOB_UID, job_labels
from grpo_worker.config.job import API_VERSION, KIND


def object_meta(job: Job, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": job_labels(job.name, job.uid),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": job.name,
                "uid": job.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def selector(job: Job, **labels: str) -> dict[str, str]:
    """Labels that exactly this job's pods have."""
    return {JOB_UID: job.uid, **labels}
