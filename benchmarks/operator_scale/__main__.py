"""The operator with 1, 50 and 200 jobs of 16 pods, beside the Kubeflow training-operator with as many PyTorchJobs of as many pods.

Invariant: each round has a fresh API server, etcd, scheduler and kwok, so no round inherits another's objects or caches; ours and the
peer's alternate, and each is asked for and judged by the same code.

- start: from the first request of a person until all pods exist, and until all run and the status of every job says so. Calls, by verb and
  resource, from the API server's audit log; CPU from /proc.
- event_to_status: a pod stops being at work, and is at work again (its Ready condition; the peer counts phases): from the request until
  the watch shows the job's status with the right number. Once while nothing else happens; ours once more while every job trains.
- steady (ours only, as the peer knows no steps): each job finishes a step a minute.
- recreate: 64 pods (8 of each of 8 jobs) are deleted, without grace: until 64 new ones exist.
- restart: the operator is stopped, a pod of every job changes, the operator starts: until every status is right. Once after SIGTERM, once
  after SIGKILL, after which ours has to wait for the end of the dead one's Lease (15 s); the peer has no Lease by default.

    python -m benchmarks.operator_scale                     # all, about half an hour on two cores
    python -m benchmarks.operator_scale --jobs 5 --only ours --profile operator.prof
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.operator_scale import peer
from benchmarks.operator_scale.figures import side_by_side
from benchmarks.operator_scale.rounds import run_round

JOBS = (1, 50, 200)
REPETITIONS_OF_ONE_JOB = 3
KINDS = ("ours", "peer")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def aims(ours: dict[str, Any]) -> dict[str, Any]:
    """The aims of the largest round: measured and bound."""
    measured = {
        "peak_rss_mib": (ours["memory"]["peak_rss_mib"], 250),
        "event_to_status_p95_seconds": (ours["event_to_status_training"]["p95_seconds"], 2),
        "cold_start_seconds": (ours["restart"]["resynced_seconds"], 15),
        "recreate_64_pods_seconds": (ours.get("recreate", {}).get("all_pods_exist_seconds"), 10),
    }
    return {
        name: {"measured": value, "aim_below": bound, "met": value is not None and value < bound}
        for name, (value, bound) in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=JOBS, help="of 16 pods each (default: 1 50 200)")
    parser.add_argument("--only", choices=KINDS, help="one of the operators")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS_OF_ONE_JOB, help="of the rounds with one job")
    parser.add_argument("--profile", type=Path, help="cProfile's result of our operator's last process (it slows it)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite kill cleans up as Ctrl-C does
    kinds = [arguments.only] if arguments.only else KINDS
    result: dict[str, Any] = {"peer_version": peer.version(), "pods_per_job": 16}
    if "peer" in kinds:
        peer.build()
    try:
        for jobs in arguments.jobs:
            starts: dict[str, list[float]] = {kind: [] for kind in kinds}
            entry: dict[str, Any] = {}
            repetitions = arguments.repetitions if jobs == 1 else 1
            for number in range(1, repetitions + 1):
                for kind in kinds:
                    only_start = number < repetitions
                    entry[kind] = run_round(kind, jobs, only_start=only_start, profile=arguments.profile, say=say)
                    starts[kind].append(entry[kind]["start"]["all_pods_exist_seconds"])
            if repetitions > 1:
                entry["all_pods_exist_seconds_each"] = starts
            if len(kinds) == 2:
                entry["theirs_over_ours"] = side_by_side(entry["ours"], entry["peer"])
            if "ours" in kinds:
                entry["aims"] = aims(entry["ours"])
            result[f"jobs_{jobs}"] = entry
    finally:
        peer.unmount()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
