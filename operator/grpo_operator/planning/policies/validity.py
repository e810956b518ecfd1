"""Jobs that can never have pods.

Invariant: nothing of such a job is made. A job that already runs is not ended by a document that became invalid: it goes on as it is, and
says so, until the document is mended.
"""

from collections.abc import Callable

from grpo_operator.facts import Job
from grpo_operator.planning.draft import Draft


def check(draft: Draft, problem: Callable[[Job], str]) -> bool:
    """`problem` says why no pod can be made of a valid document."""
    if draft.status.start_time is None:
        if draft.job.spec is None:
            draft.fail("InvalidSpec", f"{draft.job.invalid} Correct it and make the job anew.")
        elif words := problem(draft.job):
            draft.fail("InvalidConfiguration", words)
        return draft.terminal
    if draft.job.spec is None:
        draft.condition("Progressing", "False", "InvalidSpec", draft.job.invalid)
        return True
    return False
