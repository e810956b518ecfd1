"""Checkpoints on a file system: names, manifest, atomic commit, resume, pruning, preflight.

Invariant: under the checkpoint root, a directory with a checkpoint's name is whole or has been damaged from outside; a save that was
cut off at any point leaves only names that start with `.tmp-`. This package knows files, not tensors: it imports no torch.
"""

from grpo_worker.checkpoint.files import checksum_file
from grpo_worker.checkpoint.layout import CheckpointName, latest, list_checkpoints
from grpo_worker.checkpoint.manifest import Manifest, read_manifest, verify, write_manifest
from grpo_worker.checkpoint.preflight import preflight
from grpo_worker.checkpoint.prune import prune
from grpo_worker.checkpoint.resume import ResumeDecision, ResumePoint, SkippedCheckpoint, find_resume
from grpo_worker.checkpoint.transaction import CheckpointTransaction, remove_leftovers
from grpo_worker.storage import CheckpointStorageError, storage_errors

__all__ = [
    "CheckpointName",
    "CheckpointStorageError",
    "CheckpointTransaction",
    "Manifest",
    "ResumeDecision",
    "ResumePoint",
    "SkippedCheckpoint",
    "checksum_file",
    "find_resume",
    "latest",
    "list_checkpoints",
    "preflight",
    "prune",
    "read_manifest",
    "remove_leftovers",
    "storage_errors",
    "verify",
    "write_manifest",
]
