"""Run benchmarks one after the other and keep their results with the facts of the machine.

Invariant: each benchmark is a process of its own, so none inherits another's memory, threads or warm caches of Python;
a benchmark that fails is told and leaves its last result as it was.

    python -m benchmarks                 # all of them
    python -m benchmarks packing         # one
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

# In order of length: the short ones tell first when something is wrong.
BENCHMARKS = (
    "graders",
    "scrape",
    "packing",
    "checkpoint",
    "overhead",
    "weight_sync",
    "data_rows",
    "cluster_recovery",
    "operator_scale",
)
RESULTS = Path(__file__).parent / "results"
LIMIT_SECONDS = 3600.0


def cpu_model() -> str:
    """The processor as /proc/cpuinfo names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine_facts() -> dict[str, Any]:
    """What a number depends on besides the code."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu_model": cpu_model(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def run(name: str) -> dict[str, Any]:
    """The result of one benchmark. Raises RuntimeError when it fails or prints no JSON."""
    machine = machine_facts()
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{name}: not done after {LIMIT_SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise RuntimeError(f"{name}: ended with exit code {done.returncode}; its error is above")
    try:
        result = json.loads(done.stdout)
    except ValueError as error:
        raise RuntimeError(f"{name}: printed no JSON object: {done.stdout[:200]!r}") from error
    machine["load_average_after"] = round(os.getloadavg()[0], 2)
    return {"name": name, "command": f"python -m benchmarks {name}", "machine": machine, "result": result}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the result files")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arguments.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            text = json.dumps(run(name), indent=2)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            failed = True
            continue
        print(text, flush=True)
        (arguments.results / f"{name}.json").write_text(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
