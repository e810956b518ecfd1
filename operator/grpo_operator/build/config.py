"""The document that a job's pods read, in an immutable ConfigMap whose name carries the document's hash.

Invariant: a pod never sees its document change, and no value of an environment variable is in it. What a running job may change and no
process reads is left out, so such a change makes no new ConfigMap; any other change makes one, and pods keep the one that they were made
with.
"""

import hashlib
import json
from functools import lru_cache
from typing import Any

from grpo_operator.build.errors import spec_of
from grpo_operator.build.metadata import object_meta
from grpo_operator.build.ports import ports_of
from grpo_operator.build.resources import asks_for_gpus
from grpo_operator.facts import Job
from grpo_worker.config.job import API_VERSION, KIND
from grpo_worker.config.load import written_spec
from grpo_worker.config.yaml_text import yaml_text

FILE = "job.yaml"
DIRECTORY = "/etc/grpo"
HASH_LENGTH = 8
# The operator's business alone, by section ('' is `spec` itself).
LEFT_OUT = {"": ("suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished"), "rollout": ("maxReplicas",)}


def document(job: Job) -> dict[str, Any]:
    """The job with its preset resolved, every default written out and the ports of its pods."""
    spec = written_spec(spec_of(job))
    for section, names in LEFT_OUT.items():
        for name in names:
            (spec[section] if section else spec).pop(name, None)
    ports = ports_of(job)
    spec["network"] |= {
        "coordinatorPort": ports.coordinator,
        "trainerPort": ports.trainer,
        "weightSyncPort": ports.weight_sync,
        "rendezvousPort": ports.rendezvous,
        "rolloutPort": ports.rollout,
    }
    if spec["runtime"]["device"] == "auto" and asks_for_gpus(spec_of(job)):
        # A pod that was given a GPU and cannot use it says so: it does not train on the CPU.
        spec["runtime"]["device"] = "cuda"
    metadata = {"name": job.name, "namespace": job.namespace}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}


def render(job: Job) -> str:
    return _rendered(json.dumps(document(job)))[0]


def config_hash(job: Job) -> str:
    return _rendered(json.dumps(document(job)))[1]


@lru_cache(maxsize=128)
def _rendered(document_json: str) -> tuple[str, str]:
    """Text and hash. Each pod of a job asks for them, and writing the YAML is the dearest part of making a pod."""
    text = yaml_text(json.loads(document_json))
    return text, hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def config_map_name(job: Job) -> str:
    return f"{job.name}-{config_hash(job)}"


def config_map(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": object_meta(job, config_map_name(job)),
        "immutable": True,
        "data": {FILE: render(job)},
    }
