"""`grpo stop` and `grpo resume`: spec.suspend, and the wait until the operator has acted on it.

Invariant: the job's own state decides; stopping a stopped job and resuming a running one change nothing and are no errors.
"""

import argparse
import sys
import time

from grpo_operator.cli.cluster import Cluster, Json, command_line, connect, transient
from grpo_operator.cli.reading import ended, number, part, status_of, suspend_asked
from grpo_worker.errors import GRPOError, StalledError, UsageError

FIELD_MANAGER = "grpo-suspend"  # not that of `grpo submit`: a file that is applied again does not undo a stop
POLL_SECONDS = 1.0
DEFAULT_GRACE_SECONDS = 300.0
MARGIN_SECONDS = 60.0


def stop(options: argparse.Namespace) -> None:
    """Raises GRPOError; StalledError when the job is not suspended in time (it is still going to be)."""
    cluster = connect(options)
    namespace, name = cluster.namespace, options.name
    job = cluster.job(namespace, name)
    end = ended(job)
    if end is not None:
        already = (
            "is suspended already" if end.state == "Suspended" else f"has ended ({end.state}); there is nothing to stop"
        )
        print(f"{name} {already}.")
        return
    if not suspend_asked(job):
        job = _set(cluster, namespace, name, suspended=True)
    if options.no_wait:
        print(f"{name} is asked to save and stop. Look: {command_line(f'status {name}', options, namespace)}")
        return
    limit = options.timeout or _limit(job)
    print(f"{name} saves and stops; waiting up to {limit:.0f} s.", file=sys.stderr)
    try:
        _wait(cluster, namespace, name, limit)
    except KeyboardInterrupt:
        print(f"{name} stops all the same. Look: {command_line(f'status {name}', options, namespace)}", file=sys.stderr)
        raise
    print(f"{name} is suspended. It goes on with: {command_line(f'resume {name}', options, namespace)}")


def resume(options: argparse.Namespace) -> None:
    """Raises UsageError for a job that has ended."""
    cluster = connect(options)
    namespace, name = cluster.namespace, options.name
    job = cluster.job(namespace, name)
    end = ended(job)
    if end is not None and end.state != "Suspended":
        raise UsageError(f"{name} has ended ({end.state}); an ended job does not start again.")
    if not suspend_asked(job):
        print(f"{name} is not suspended.")
        return
    _set(cluster, namespace, name, suspended=False)
    print(f"{name} goes on. Follow it: {command_line(f'status {name} --follow', options, namespace)}")


def _set(cluster: Cluster, namespace: str, name: str, *, suspended: bool) -> Json:
    return cluster.patch_job(namespace, name, {"spec": {"suspend": suspended}}, FIELD_MANAGER)


def _limit(job: Json) -> float:
    """The operator gives the coordinator one grace period to save, and each pod one to end."""
    grace = number(part(job, "spec", "runtime"), "terminationGracePeriodSeconds")
    return 2 * float(DEFAULT_GRACE_SECONDS if grace is None else grace) + MARGIN_SECONDS


def _wait(cluster: Cluster, namespace: str, name: str, limit_seconds: float) -> None:
    """Returns when the job is suspended. Raises UsageError when it ended or was resumed, StalledError after the limit."""
    deadline = time.monotonic() + limit_seconds
    said = ""
    while True:
        message, job = "", None
        try:
            job = cluster.job(namespace, name)
        except GRPOError as error:
            if not transient(error):
                raise
            message = str(error)
        if job is not None:
            end = ended(job)
            if end is not None and end.state == "Suspended":
                return
            if end is not None:
                raise UsageError(f"{name} ended before it stopped ({end.state}): {end.message}")
            if not suspend_asked(job):
                raise UsageError(f"{name} was resumed by somebody else.")
            status = status_of(job)
            message = ": ".join(str(status[key]) for key in ("state", "message") if status.get(key))
        if message and message != said:
            print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr)
            said = message
        if time.monotonic() > deadline:
            raise StalledError(
                f"{name} is not suspended after {limit_seconds:.0f} s ({said or 'no word from the operator'}). It stays asked to stop; "
                "is the operator running?"
            )
        time.sleep(POLL_SECONDS)
