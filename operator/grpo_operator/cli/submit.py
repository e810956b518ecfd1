"""`grpo submit`: from a file to a job on a cluster, and to its end.

Invariant: nothing is sent before the whole document is valid here; once it is sent, the job does not depend on this process.
"""

import argparse
import sys

from grpo_operator.cli.api_errors import Refused
from grpo_operator.cli.cluster import Cluster, Json, command_line, connect
from grpo_operator.cli.document import cluster_notes, read_document, require_workspace, target_namespace
from grpo_operator.cli.reading import ended, part, suspend_asked
from grpo_operator.cli.status import follow_to_end
from grpo_operator.cli.tools import Tools
from grpo_worker.config import GRPOJob, load_job
from grpo_worker.errors import UsageError


def submit(options: argparse.Namespace, tools: Tools) -> None:
    """Raises GRPOError: of the document, of the API server, or of the job's own end."""
    job = load_job(options.file, options.overrides)
    require_workspace(job.spec)
    document = read_document(options.file, options.overrides)
    cluster = connect(options)
    namespace = target_namespace(document, options.namespace, cluster.namespace)
    before = cluster.find_job(namespace, job.name)
    if before is not None:
        _require_unfinished(before, namespace)
    after = cluster.apply_job(namespace, document, dry_run=options.dry_run, force=options.force_conflicts)
    for note in [*cluster_notes(job.spec), *_claim_notes(cluster, namespace, job)]:
        print(f"grpo: note: {note}", file=sys.stderr)
    if options.dry_run:
        print(f"{job.name} in namespace {namespace}: would be {_outcome(before, after)}; nothing was stored")
        return
    print(f"{job.name} in namespace {namespace}: {_outcome(before, after)}", flush=True)
    if options.no_follow:
        print(f"Follow it: {command_line(f'status {job.name} --follow', options, namespace)}")
    elif before is None and suspend_asked(after):
        print(f"Let it start: {command_line(f'resume {job.name}', options, namespace)}")
    else:
        follow_to_end(cluster, namespace, job.name, options, tools)


def _require_unfinished(job: Json, namespace: str) -> None:
    """Raises UsageError: a finished job stays finished, and one that is being deleted cannot be changed."""
    name = job["metadata"]["name"]
    if part(job, "metadata").get("deletionTimestamp"):
        raise UsageError(f"{name} in namespace {namespace} is being deleted. Submit again when it is gone.")
    end = ended(job)
    if end is not None and end.state != "Suspended":
        raise UsageError(
            f"{name} in namespace {namespace} has ended ({end.state}), and an ended job does not start again. Delete it: "
            f"kubectl delete grpojob {name} -n {namespace} (its checkpoints stay, and checkpoint.resume says whether the next job "
            "goes on from them); or take another name: --set metadata.name=NAME"
        )


def _claim_notes(cluster: Cluster, namespace: str, job: GRPOJob) -> list[str]:
    """The claims of the job that do not exist: its pods would wait for them."""
    runtime = job.spec.runtime
    claims = [runtime.workspace.claim_name] if runtime.workspace else []
    claims += [volume.claim_name for volume in runtime.volumes]
    try:
        missing = [claim for claim in dict.fromkeys(claims) if not cluster.has_claim(namespace, claim)]
    except Refused:
        return []  # who may not look at claims is told by the job's Scheduled condition
    return [
        f"there is no PersistentVolumeClaim {claim} in namespace {namespace}; pods wait until there is"
        for claim in missing
    ]


def _outcome(before: Json | None, after: Json) -> str:
    if before is None:
        return "created"
    return "unchanged" if before["metadata"]["generation"] == after["metadata"]["generation"] else "changed"
