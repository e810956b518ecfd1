"""`grpo demo`: the demo's model and data, and the whole thing once, from nothing to a report."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

DIRECTORY = Path("demo")
EXAMPLE = Path("examples/arithmetic.yaml")
RUN_DIRECTORY = Path("runs/demo")
ACCURACY = "val/accuracy/pass@1"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    demo = commands.add_parser("demo", help="train a tiny model from nothing, in minutes").add_subparsers(
        metavar="COMMAND", required=True
    )
    prepare = demo.add_parser("prepare", help="write a tiny model and arithmetic problems")
    prepare.add_argument("directory", type=Path, nargs="?", default=DIRECTORY, help=f"default {DIRECTORY}")
    prepare.add_argument("--seed", type=int, default=1, help="of the problems and the model, default 1")
    prepare.set_defaults(function=_prepare)
    run = demo.add_parser("run", help=f"prepare, train {EXAMPLE}, report (from the project's directory)")
    run.set_defaults(function=_run)


def _prepare(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    from grpo_worker.demo.prepare import prepare_demo

    logging.disable_progress_bar()  # of the one file that is saved
    paths = prepare_demo(options.directory, options.seed, report=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"model {paths.model}, training {paths.train}, held out {paths.test}")


def _run(options: argparse.Namespace) -> None:
    """The last line is `demo: accuracy A -> B over N steps in T`, with numbers read from the run's own metrics."""
    from grpo_worker.cli.run import report, train
    from grpo_worker.metric_loggers.formatting import format_duration

    started = time.monotonic()
    shutil.rmtree(RUN_DIRECTORY, ignore_errors=True)  # a demo always starts from the beginning
    _prepare(argparse.Namespace(directory=DIRECTORY, seed=1))
    train(str(EXAMPLE), [], RUN_DIRECTORY)
    report(RUN_DIRECTORY)
    lines = [json.loads(line) for line in (RUN_DIRECTORY / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line[ACCURACY] for line in lines if ACCURACY in line]
    steps, seconds = lines[-1]["step"], time.monotonic() - started
    print(
        f"demo: accuracy {accuracies[0]:.3f} -> {accuracies[-1]:.3f} over {steps} steps in {format_duration(seconds)}"
    )
