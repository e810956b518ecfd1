"""The command lines of the cluster commands.

Invariant: parsing needs nothing but argparse; a command's module is imported when it runs.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from grpo_operator.cli.tools import Tools

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_commands(commands: Commands, tools: Tools) -> None:
    """Add `submit`, `status`, `logs`, `stop` and `resume`, and jobs to `watch`. `tools` comes from the `grpo` command that they become part of."""
    access = _access()
    _add_submit(commands, access, tools)
    _add_status(commands, access, tools)
    _add_logs(commands, access)
    _add_stop_and_resume(commands, access)
    if (watch := commands.choices.get("watch")) is not None:
        _access(watch).set_defaults(
            function=functools.partial(_watch, tools=tools, a_run=watch.get_default("function"))
        )


def _access(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The options that say which cluster and namespace are meant, on a parser of their own or on this one."""
    access = parser or argparse.ArgumentParser(add_help=False)
    group = access.add_argument_group("cluster")
    group.add_argument("-n", "--namespace", help="namespace (default: that of the kubeconfig's context)")
    group.add_argument("--context", help="context of the kubeconfig (default: its current one)")
    group.add_argument("--kubeconfig", help="kubeconfig file (default: $KUBECONFIG, ~/.kube/config)")
    return access


def _add_submit(commands: Commands, access: argparse.ArgumentParser, tools: Tools) -> None:
    parser = commands.add_parser(
        "submit",
        parents=[access],
        help="train a GRPOJob on a cluster",
        description="Validate a GRPOJob, apply it to a cluster, and follow it to its end. The exit code is the run's.",
    )
    parser.add_argument("file", help="the GRPOJob (YAML)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE", help="override a field"
    )
    parser.add_argument("--no-follow", action="store_true", help="return once the API server has the job")
    parser.add_argument("--dry-run", action="store_true", help="let the API server check it, and store nothing")
    parser.add_argument(
        "--force-conflicts", action="store_true", help="take over fields that somebody else set, e.g. kubectl scale"
    )
    parser.set_defaults(function=functools.partial(_submit, tools=tools))


def _add_status(commands: Commands, access: argparse.ArgumentParser, tools: Tools) -> None:
    parser = commands.add_parser(
        "status",
        parents=[access],
        help="show the jobs of a cluster, or one",
        description="Without a name: a table of the jobs. With one: its state, what is wrong, and what to do next.",
    )
    parser.add_argument("name", nargs="?", help="the job")
    parser.add_argument("-f", "--follow", "--watch", action="store_true", help="show it live until it ends")
    parser.add_argument("-A", "--all-namespaces", action="store_true", help="the jobs of all namespaces")
    parser.set_defaults(function=functools.partial(_status, tools=tools))


def _add_logs(commands: Commands, access: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "logs",
        parents=[access],
        help="print the logs of a job's pods",
        description="Print the logs of a job's pods, each line with its member's name when there are several.",
    )
    parser.add_argument("name", help="the job")
    parser.add_argument("--role", choices=("coordinator", "trainer", "rollout", "all"), default="coordinator")
    parser.add_argument("--index", type=_index, help="only the pod of this index, e.g. 1 for rollout-1")
    parser.add_argument("--attempt", type=_index, help="only pods that were made for this attempt")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the job ends, over pods that are replaced"
    )
    parser.add_argument("--tail", type=_index, metavar="LINES", help="begin with the last so many lines of each pod")
    parser.set_defaults(function=_logs)


def _add_stop_and_resume(commands: Commands, access: argparse.ArgumentParser) -> None:
    stop = commands.add_parser(
        "stop",
        parents=[access],
        help="save, stop and free the devices of a job",
        description="Suspend a job: it saves a checkpoint and its pods are deleted. `grpo resume` goes on from there.",
    )
    stop.add_argument("name", help="the job")
    stop.add_argument("--no-wait", action="store_true", help="return at once")
    stop.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS",
        help="longest wait (default: twice runtime.terminationGracePeriodSeconds, and a minute)",
    )  # fmt: skip
    stop.set_defaults(function=_stop)
    resume = commands.add_parser(
        "resume",
        parents=[access],
        help="let a stopped job go on",
        description="End the suspension of a job: its pods are made again and it goes on from its checkpoint.",
    )
    resume.add_argument("name", help="the job")
    resume.set_defaults(function=_resume)


def _index(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError("must be a positive number of seconds")
    return value


def _submit(options: argparse.Namespace, tools: Tools) -> None:
    from grpo_operator.cli.submit import submit

    submit(options, tools)


def _status(options: argparse.Namespace, tools: Tools) -> None:
    from grpo_operator.cli.status import status

    status(options, tools)


def _logs(options: argparse.Namespace) -> None:
    from grpo_operator.cli.logs import logs

    logs(options)


def _watch(options: argparse.Namespace, tools: Tools, a_run: Callable[[argparse.Namespace], None]) -> None:
    """A directory of this machine is a run; anything else is the name of a job."""
    if options.run.parent != Path() or options.run.is_dir():
        a_run(options)
        return
    from grpo_operator.cli.watch import watch

    watch(options, tools)


def _stop(options: argparse.Namespace) -> None:
    from grpo_operator.cli.suspend import stop

    stop(options)


def _resume(options: argparse.Namespace) -> None:
    from grpo_operator.cli.suspend import resume

    resume(options)
