"""The GRPOJob document: pydantic models that validate it, default it, and generate its CRD and its reference page.

Invariant: this package imports nothing of ours but `grpo_worker.errors`, and nothing heavier than pydantic and PyYAML: the operator
and `grpo validate` need no more than this.
"""

from grpo_worker.config.job import GRPOJob, Metadata, Spec
from grpo_worker.config.load import (
    InvalidJob,
    Issue,
    job_from_document,
    load_job,
    load_written,
    parse_yaml,
    resolved_document,
    written_document,
)
from grpo_worker.config.rules import RULES

__all__ = [
    "RULES",
    "GRPOJob",
    "InvalidJob",
    "Issue",
    "Metadata",
    "Spec",
    "job_from_document",
    "load_job",
    "load_written",
    "parse_yaml",
    "resolved_document",
    "written_document",
]
