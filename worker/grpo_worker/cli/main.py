"""`grpo`: run, validate, and what belongs around a run.

Invariant: a command imports what it needs when it runs, so `grpo validate` works with the base installation and starts at once; an
error for a person is one message on stderr and an exit code of the contract.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

from grpo_worker import __version__
from grpo_worker.cli import data, demo, job, model, run
from grpo_worker.cli.tools import Tools
from grpo_worker.errors import ExitCode, GRPOError

INTERRUPTED = 130  # as a shell reports SIGINT

# Each adds its commands to the parser's subcommands. Installed packages add theirs by the entry point group `grpo.commands`: functions
# that take the subcommands and `Tools`.
GROUPS: tuple[Callable[["argparse._SubParsersAction[argparse.ArgumentParser]"], None], ...] = (
    run.add_commands,
    job.add_commands,
    data.add_commands,
    model.add_commands,
    demo.add_commands,
)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="grpo", description="GRPO training from one YAML, on one machine or on Kubernetes."
    )
    parser.add_argument("--version", action="version", version=f"grpo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in GROUPS:
        add(commands)
    for entry in entry_points(group="grpo.commands"):
        entry.load()(commands, Tools())
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process."""
    sys.exit(call(arguments))


def call(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = make_parser().parse_args(arguments)
    except SystemExit as end:  # argparse's own: 0 after --help, 2 for a wrong command line
        return int(ExitCode.USAGE) if end.code == 2 else int(end.code or 0)
    try:
        options.function(options)
    except GRPOError as error:
        print(f"grpo: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("grpo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0  # `grpo ... | head`
    return int(ExitCode.DONE)


if __name__ == "__main__":
    main()
