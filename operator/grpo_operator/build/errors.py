"""What a document may say that no pod can be made of."""

from grpo_operator.facts import Job
from grpo_worker.config import Spec


class CannotBuild(ValueError):
    """A field of the job that cannot become a pod; the message names it and what to do. The job has failed: trying again cannot help."""


def spec_of(job: Job) -> Spec:
    """The job's valid spec. Raises CannotBuild."""
    if job.spec is None:
        raise CannotBuild(job.invalid or "the document is not valid")
    return job.spec
