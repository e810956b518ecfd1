"""Showing a job until it ends.

Invariant: following only reads; whatever ends it, the job goes on. A short outage of the API server is shown and waited out, a long
one is an error.
"""

import time
from typing import Any

from grpo_operator.cli.api_errors import Refused
from grpo_operator.cli.cluster import Cluster, transient
from grpo_operator.cli.live import new_events, view_event, view_status
from grpo_operator.cli.reading import Job, JobEnded, ended, entries, part, status_of
from grpo_operator.cli.tools import View
from grpo_worker.errors import GRPOError, InternalError

POLL_SECONDS = 2.0
OUTAGE_SECONDS = 300.0  # without an answer of the API server
UNSEEN_SECONDS = 20.0  # until a job without any status is remarked upon
EVENTS_AT_START = 6


class JobGone(InternalError):
    """The job was deleted while somebody followed it."""

    reason = "JobDeleted"


class Follower:
    """Feeds a view with one job."""

    def __init__(
        self, cluster: Cluster, namespace: str, name: str, view: View, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._view = view
        self._uid = ""
        self._seen: dict[str, float] = {}
        self._events_refused = False
        self._failing_since: float | None = None
        self._began = time.monotonic()
        self._remarked = False
        self._last: dict[str, Any] = {}

    def run(self) -> JobEnded:
        """Returns when the job has ended or is suspended. Raises JobGone, Unreachable."""
        while True:
            job = self._read()
            if job is not None and (end := ended(job)) is not None:
                return end
            time.sleep(POLL_SECONDS)

    def _read(self) -> Job | None:
        """Show the newest; None when the API server did not answer."""
        try:
            job = self._same_job(self._cluster.find_job(self._namespace, self._name))
            events = self._events()
        except GRPOError as error:
            if not transient(error):
                raise
            self._outage(error)
            return None
        if self._failing_since is not None:
            self._failing_since = None
            events.append(_remark("info", "the API server answers again"))
        unseen = not entries(status_of(job), "conditions") and time.monotonic() - self._began > UNSEEN_SECONDS
        if unseen and not self._remarked:
            self._remarked = True
            events.append(
                _remark(
                    "warning",
                    "No operator has looked at this job yet. Is one running, and does it watch this namespace?",
                )
            )
        self._last = view_status(job)
        self._view.update(self._last, events)
        return job

    def _same_job(self, job: Job | None) -> Job:
        uid = str(part(job, "metadata").get("uid", ""))
        if job is None or (self._uid and uid != self._uid):
            raise JobGone(
                f"{self._name} was deleted from namespace {self._namespace}; its checkpoints stay in its volume."
            )
        self._uid = uid
        return job

    def _events(self) -> list[dict[str, Any]]:
        if self._events_refused:
            return []
        first = not self._seen
        try:
            fresh = new_events(self._cluster.events(self._namespace, self._uid), self._seen)
        except Refused:
            self._events_refused = True
            return [_remark("warning", f"events are not shown: no right to list them in namespace {self._namespace}")]
        return [view_event(event) for event in (fresh[-EVENTS_AT_START:] if first else fresh)]

    def _outage(self, error: GRPOError) -> None:
        """Raises the error when the outage is long."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._view.update(self._last, [_remark("warning", f"{error} Trying again for {OUTAGE_SECONDS:.0f} s.")])
        elif now - self._failing_since > OUTAGE_SECONDS:
            raise error


def _remark(level: str, message: str) -> dict[str, Any]:
    return {"time": time.time(), "role": "grpo", "level": level, "reason": "Following", "message": message}
