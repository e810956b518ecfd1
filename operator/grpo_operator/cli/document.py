"""The document that is sent: what the person wrote and `--set`, no more.

Invariant: defaults and presets are not written into the object: the same file means the same object whether it comes by `grpo submit`
or by `kubectl apply`, and fields that the file leaves out stay with whoever sets them.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from grpo_worker.config import Spec, parse_yaml
from grpo_worker.config.load import apply_override
from grpo_worker.errors import UsageError

# Written by the API server: an object that was read from a cluster can be submitted again.
SERVER_METADATA = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink", "uid")
WORKSPACE = "/workspace"


def read_document(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The document of a file that `load_job` takes with the same overrides."""
    document: dict[str, Any] = parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    for override in overrides:
        apply_override(document, override)
    document.pop("status", None)
    for key in SERVER_METADATA:
        document["metadata"].pop(key, None)
    return document


def target_namespace(document: dict[str, Any], asked: str | None, default: str) -> str:
    """The namespace that is meant. Raises UsageError where file and command line disagree."""
    written = document["metadata"].get("namespace")
    if asked and written and asked != written:
        raise UsageError(f"-n {asked}: the file says metadata.namespace: {written}. Leave one of the two out.")
    return str(written or asked or default)


def require_workspace(spec: Spec) -> None:
    """Raises UsageError for a job that no cluster can run."""
    if spec.runtime.workspace is None:
        raise UsageError(
            "spec.runtime.workspace: missing. On a cluster the pods of a job share one volume, where model, data and checkpoints "
            "are. Name a PersistentVolumeClaim: --set runtime.workspace.claimName=NAME"
        )


def cluster_notes(spec: Spec) -> list[str]:
    """Where the document means something else on a cluster than on the machine that submits it."""
    claim = spec.runtime.workspace.claim_name if spec.runtime.workspace else ""
    files = [("data.trainFiles", path) for path in spec.data.train_files]
    files += [("data.validationFiles", path) for path in spec.data.validation_files]
    if spec.model.path.startswith("/") or Path(spec.model.path).is_dir():  # else it may be a Hugging Face id
        files.append(("model.path", spec.model.path))
    files = [(field, path) for field, path in files if not path.startswith("hf://")]
    relative = [path for _, path in files if not path.startswith("/")]
    notes = []
    if relative:
        notes.append(f"read from the volume of claim {claim}, not from this machine: {', '.join(relative)}")
    mounts = [WORKSPACE, *(volume.mount_path for volume in spec.runtime.volumes)]
    absolute = [
        (field, path) for field, path in (*files, ("checkpoint.path", spec.checkpoint.path)) if path.startswith("/")
    ]
    notes += [
        f"{field}: {path} is on none of the job's volumes ({', '.join(mounts)}); it has to be in the image"
        if field != "checkpoint.path"
        else f"{field}: {path} is on none of the job's volumes ({', '.join(mounts)}): checkpoints cannot be written there"
        for field, path in absolute
        if not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts)
    ]
    if spec.suspend:
        notes.append("spec.suspend: true: the job waits until `grpo resume`")
    return notes
