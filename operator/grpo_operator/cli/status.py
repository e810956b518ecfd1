"""`grpo status`: the jobs of a namespace, one job, or one job live.

Invariant: it only reads. Following ends with the exit code of the job; everything else with 0.
"""

import argparse
import sys
import time

from grpo_operator.cli.cluster import Cluster, command_line, connect
from grpo_operator.cli.follow import Follower
from grpo_operator.cli.text import snapshot, table
from grpo_operator.cli.tools import Tools
from grpo_worker.errors import UsageError


def status(options: argparse.Namespace, tools: Tools) -> None:
    """Raises GRPOError; with --follow also JobFailed and YieldedError."""
    if options.name is None and options.follow:
        raise UsageError("--follow needs the name of a job: grpo status NAME --follow")
    if options.name is not None and options.all_namespaces:
        raise UsageError("-A lists the jobs of all namespaces; with a name, choose the namespace with -n")
    cluster = connect(options)
    if options.name is None:
        _print_table(cluster, everywhere=options.all_namespaces)
    elif options.follow:
        follow_to_end(cluster, cluster.namespace, options.name, options, tools)
    else:
        job = cluster.job(cluster.namespace, options.name)
        print(snapshot(job, time.time(), lambda command: command_line(command, options, cluster.namespace)))


def follow_to_end(cluster: Cluster, namespace: str, name: str, options: argparse.Namespace, tools: Tools) -> None:
    """Show the job until it ends, and raise what it ended with. Ctrl-C ends the showing alone."""
    cluster.job(namespace, name)  # a name that is not there is told before a view opens
    view = tools.open_view(sys.stdout)
    try:
        end = Follower(cluster, namespace, name, view).run()
    except KeyboardInterrupt:
        view.close()
        print(
            f"{name} goes on without you. Look again: {command_line(f'status {name} --follow', options, namespace)}\n"
            f"Stop it (it saves first): {command_line(f'stop {name}', options, namespace)}",
            file=sys.stderr,
        )
        raise
    finally:
        view.close()
    end.raise_failure(name, command_line(f"resume {name}", options, namespace))
    print(f"{name} succeeded." + (f" {end.message}" if end.message else ""))


def _print_table(cluster: Cluster, *, everywhere: bool) -> None:
    jobs = cluster.jobs(None if everywhere else cluster.namespace)
    if not jobs:
        print("No GRPOJobs in any namespace." if everywhere else f"No GRPOJobs in namespace {cluster.namespace}.")
        return
    print(table(jobs, time.time(), namespaces=everywhere))
