"""`make demo`: the whole thing once, from nothing to a report.

Invariant: the last line is `demo: accuracy A -> B over N steps in T`, with numbers read from the run's own metrics.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from grpo_worker.cli.main import call
from grpo_worker.metric_loggers.formatting import format_duration

EXAMPLE = Path("examples/arithmetic.yaml")
RUN_DIRECTORY = Path("runs/demo")
ACCURACY = "val/accuracy/pass@1"


def main() -> int:
    """Run from the project's root. The exit code is the first command's that failed."""
    started = time.monotonic()
    shutil.rmtree(RUN_DIRECTORY, ignore_errors=True)  # a demo always starts from the beginning
    for command in (
        ["demo", "prepare", "demo"],
        ["run", str(EXAMPLE), "--run-dir", str(RUN_DIRECTORY)],
        ["report", str(RUN_DIRECTORY)],
    ):
        if code := call(command):
            return code
    lines = [json.loads(line) for line in (RUN_DIRECTORY / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line[ACCURACY] for line in lines if ACCURACY in line]
    steps, seconds = lines[-1]["step"], time.monotonic() - started
    print(
        f"demo: accuracy {accuracies[0]:.3f} -> {accuracies[-1]:.3f} over {steps} steps in {format_duration(seconds)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
