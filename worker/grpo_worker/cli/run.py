"""`grpo run`, `grpo report`, `grpo watch` and `grpo trace`."""

import argparse
import shlex
import sys
from pathlib import Path

from grpo_worker.cli.job import add_document
from grpo_worker.config import load_job
from grpo_worker.errors import UsageError, YieldedError


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    run = commands.add_parser(
        "run",
        help="train a GRPOJob on this machine",
        description="Train a GRPOJob on this machine, without Kubernetes.",
    )
    add_document(run)
    run.add_argument("--run-dir", type=Path, help="where logs, metrics and checkpoints go (default: runs/NAME)")
    run.add_argument(
        "--metrics", type=int, metavar="PORT", help="serve /metrics of all processes on this port, for Prometheus"
    )
    run.set_defaults(function=_run)
    report = commands.add_parser(
        "report",
        help="write a run's report",
        description="Write one HTML file and one PNG with a run's curves and samples.",
    )
    report.add_argument("run_dir", type=Path, help="the run directory")
    report.set_defaults(function=_report)

    watch = commands.add_parser(
        "watch",
        help="serve a run's report as a page that follows it",
        description="Serve the report of a run as a page that updates while the run goes on, for a browser on this machine.",
    )
    watch.add_argument("run", type=Path, help="the run directory; or the name of a job on a cluster")
    watch.add_argument("--port", type=int, default=0, help="of the page (default: a free one)")
    watch.set_defaults(function=_watch)

    trace = commands.add_parser(
        "trace",
        help="draw the last steps of a run as a timeline",
        description="Draw who did what in the last steps of a run: trace.svg, and trace.json for ui.perfetto.dev or chrome://tracing.",
    )
    trace.add_argument("run", type=Path, help="the run directory")
    trace.add_argument("--steps", type=int, default=3, help="how many of the last steps (default: 3)")
    trace.set_defaults(function=_trace)


def _trace(options: argparse.Namespace) -> None:
    from grpo_worker.report.trace import write_trace

    for path in write_trace(options.run, options.steps):
        print(path)


def _watch(options: argparse.Namespace) -> None:
    from grpo_worker.report.live import watch_run

    watch_run(options.run, options.port)


def _run(options: argparse.Namespace) -> None:
    train(options.file, options.overrides, options.run_dir, options.metrics)


def _report(options: argparse.Namespace) -> None:
    report(options.run_dir)


def train(file: str, overrides: list[str], run_dir: Path | None, metrics_port: int | None = None) -> None:
    """Run a job to its end on this machine, with a view on stdout. Raises GRPOError; YieldedError says how to go on."""
    from grpo_worker.local.supervisor import Supervisor
    from grpo_worker.local.view import open_view
    from grpo_worker.run_directory import RunDirectory

    job = load_job(file, overrides)
    root = run_dir or Path("runs") / job.name
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir {root}: cannot be made: {error.strerror}") from error
    view = open_view(sys.stdout)
    try:
        Supervisor(job, RunDirectory(root), view, metrics_port).run()
    except YieldedError as error:
        again = [file, *(f"--set={item}" for item in overrides), *(["--run-dir", str(run_dir)] if run_dir else [])]
        again += [f"--metrics={metrics_port}"] if metrics_port is not None else []
        raise YieldedError(f"{error}. It goes on from its checkpoint with: grpo run {shlex.join(again)}") from error
    finally:
        view.close()
    print(f"Finished. Report: grpo report {shlex.quote(str(root))}")


def report(run_dir: Path) -> None:
    """Write the report of a run and print its files. Raises DataError."""
    from grpo_worker.report import write_report

    for path in write_report(run_dir):
        print(path)
