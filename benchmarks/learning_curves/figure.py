"""The results of all runs in one file, and their figure.

    python -m benchmarks.learning_curves.figure RUNS_DIR

RUNS_DIR holds SIDE-ALGORITHM-SEED.jsonl (TRL's curve.jsonl, a run's metrics.jsonl) and accuracy.jsonl (what `accuracy` printed, with
`SIDE-ALGORITHM-SEED`, or `before`, as the model's name).
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "h100-learning-curves.json"
FIGURE = ROOT / "docs" / "figures" / "learning-curves.svg"
SIDES = {"ours": ("grpo-operator", "#1f6f8b"), "trl": ("TRL 1.16.0", "#c05621")}
ALGORITHMS = ("GRPO", "DrGRPO")
NAMES = {"critic/score/mean": "reward", "response_length/mean": "length"}


def collect(directory: Path) -> dict[str, Any]:
    """Curves and accuracies by `SIDE-ALGORITHM-SEED`."""
    lines = [json.loads(line) for line in (directory / "accuracy.jsonl").read_text().splitlines()]
    accuracy = {line.pop("model"): line for line in lines}
    runs = {}
    for file in sorted(directory.glob("*-*-*.jsonl")):
        points = [json.loads(line) for line in file.read_text().splitlines()]
        named = [{NAMES.get(name, name): value for name, value in point.items()} for point in points]
        curve = {key: [round(point[key], 4) for point in named if point["step"] > 0] for key in ("reward", "length")}
        runs[file.stem] = {**accuracy[file.stem], "curve": curve}
    return {"before": accuracy["before"], "runs": runs}


def draw(result: dict[str, Any]) -> None:
    """Reward a step: a thin line a seed, a thick one for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, algorithm in zip(axes, ALGORITHMS, strict=True):
        for side, (label, colour) in SIDES.items():
            chosen = [run for name, run in result["runs"].items() if name.startswith(f"{side}-{algorithm}-")]
            curves = [run["curve"]["reward"] for run in chosen]
            steps = range(1, len(curves[0]) + 1)
            for curve in curves:
                axis.plot(steps, curve, color=colour, linewidth=0.6, alpha=0.5)
            axis.plot(
                steps, [statistics.fmean(values) for values in zip(*curves, strict=True)], color=colour, label=label
            )
        axis.set_title(algorithm)
        axis.set_xlabel("step of 64 prompts x 8 samples")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of right answers in training")
    axes[0].legend()
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "learning-curves"
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    result = collect(Path(sys.argv[1]))
    RESULT.write_text(json.dumps(result) + "\n")
    draw(result)
    for algorithm in ALGORITHMS:
        for side in SIDES:
            chosen = [run for name, run in result["runs"].items() if name.startswith(f"{side}-{algorithm}-")]
            figures = ", ".join(f"{run['accuracy']:.3f}" for run in chosen)
            length = statistics.fmean(run["length"] for run in chosen)
            print(f"{algorithm} {side}: accuracy {figures}; answers of {length:.1f} tokens")


if __name__ == "__main__":
    main()
