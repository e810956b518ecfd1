"""What the machinery around the model costs in a real `grpo run`: time, memory, and the wait for checkpoints.

Invariant: everything is read from outside, from what every run leaves: metrics.jsonl, /proc and the files of its last
checkpoint. The run is the demo's model and sizes on this machine: 32 prompts x 8 samples of at most 24 tokens a step.
Such steps are as short as they get, so each share below is an upper end: the coordinator's work grows with tokens far
slower than the model's.

- coordinator: the step less generation, log-probs, update, weight sync, saving and validation. It is what is left
  between them: tail of the rewards, advantages, correction, metrics, records.
- transport: log-probs and update as the coordinator times them, less the same inside the trainer: encoding, HTTP,
  decoding. It is inside the parts above, so it is not in `coordinator`.
- checkpoint: seconds that training stood still, beside a synchronous torch.save of as many bytes to the same directory,
  right after the run.

    python -m benchmarks.overhead
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import ROLES, memory_by_role
from benchmarks.workspace import Run, grpo_run, make_workspace, write_job

MODEL_PARTS = ("gen", "old_log_prob", "ref", "update_actor", "update_weights", "save_checkpoint", "testing")
SHOWN_PARTS = ("gen", "reward", "old_log_prob", "adv", "update_actor", "update_weights", "save_checkpoint", "step")
FIRST_STEPS = 3  # not counted: caches, first compilations, the first checkpoint
POLL_SECONDS = 0.1
LIMIT_SECONDS = 900.0


def seconds(line: dict[str, Any], part: str) -> float:
    return float(line.get(f"timing_s/{part}", 0.0))


def coordinator_seconds(line: dict[str, Any]) -> float:
    """Of one step: what no part of the model's work or of saving covers."""
    return seconds(line, "step") - sum(seconds(line, part) for part in MODEL_PARTS)


def transport_seconds(line: dict[str, Any]) -> float:
    """Of one step: log-probs and update, less the trainer's own time in them."""
    outside = seconds(line, "old_log_prob") + seconds(line, "update_actor")
    inside = sum(seconds(line, f"trainer_{part}") for part in ("log_probs", "ref_log_probs", "update"))
    return outside - inside


def time_shares(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over steps after the first ones."""
    lines = [line for line in metrics if line["step"] > FIRST_STEPS]
    result: dict[str, Any] = {"steps_counted": len(lines)}
    for name, of in (("coordinator", coordinator_seconds), ("transport", transport_seconds)):
        shares = [of(line) / seconds(line, "step") for line in lines]
        result[f"{name}_share"] = round(statistics.median(shares), 4)
        result[f"{name}_share_max"] = round(max(shares), 4)
        result[f"{name}_seconds"] = round(statistics.median(of(line) for line in lines), 4)
    present = {part: [seconds(line, part) for line in lines if f"timing_s/{part}" in line] for part in SHOWN_PARTS}
    result["median_seconds"] = {part: round(statistics.median(values), 4) for part, values in present.items() if values}
    return result


def watch(run: Run, steps: int) -> dict[str, dict[str, float]]:
    """Wait for the run's end; memory of its processes as it was last seen whole, in the last two steps."""
    memory: dict[str, dict[str, float]] = {}
    deadline = time.monotonic() + LIMIT_SECONDS
    while run.process.poll() is None:
        run.require(deadline)
        if run.steps() >= steps - 2:
            seen = memory_by_role(run.process.pid)
            if all(role in seen for role in ROLES):
                memory = seen
        time.sleep(POLL_SECONDS)
    run.require(deadline)
    return memory


def checkpoint_stall(run: Run, metrics: list[dict[str, Any]], rounds: int = 5) -> dict[str, Any]:
    """The run's saves beside plain ones of as many bytes."""
    from benchmarks.checkpoint import plain_save, size_bytes, tensors_of

    stalls = [line["timing_s/save_checkpoint"] for line in metrics if "timing_s/save_checkpoint" in line]
    newest = max((run.root / "run" / "checkpoints").glob("epoch_*"), key=lambda path: path.stat().st_mtime)
    total_bytes = size_bytes(newest)
    tensors = tensors_of(total_bytes)
    plain = [plain_save(tensors, run.root / "plain.pt") for _ in range(rounds + 1)][1:]
    save = statistics.median(one["save"] for one in plain)
    with_fsync = statistics.median(one["with_fsync"] for one in plain)
    return {
        "bytes": total_bytes,
        "stall_seconds": round(statistics.median(stalls), 4),
        "stall_seconds_each": [round(stall, 4) for stall in stalls],
        "torch_save_seconds": round(save, 4),
        "torch_save_with_fsync_seconds": round(with_fsync, 4),
        "stall_over_torch_save": round(statistics.median(stalls) / save, 2),
        "stall_over_torch_save_with_fsync": round(statistics.median(stalls) / with_fsync, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step")
    parser.add_argument("--samples", type=int, default=8, help="samples a prompt")
    parser.add_argument("--save-freq", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default the system's temporary one")
    arguments = parser.parse_args()
    if arguments.steps <= FIRST_STEPS:
        parser.error(f"--steps {arguments.steps}: the first {FIRST_STEPS} are not counted, so use more")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        root = Path(name)
        make_workspace(root, arguments.prompts * arguments.steps)
        job = write_job(root, arguments.steps, arguments.prompts, arguments.samples, arguments.save_freq)
        with grpo_run(root, job) as run:
            memory = watch(run, arguments.steps)
            metrics = [line for line in run.metrics() if line["step"] > 0]
        result = {
            "steps": len(metrics),
            "prompts": arguments.prompts,
            "samples": arguments.samples,
            "response_length_mean": round(statistics.mean(line["response_length/mean"] for line in metrics), 1),
            **time_shares(metrics),
            "memory": memory,
            "checkpoint": checkpoint_stall(run, metrics),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
