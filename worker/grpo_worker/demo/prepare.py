"""`grpo demo prepare DIR`: everything that examples/arithmetic.yaml needs.

Invariant: `demo.json` is written last and carries a checksum of every file and a digest of the code that made them; a directory whose
stamp fits is left alone, any other one is made again.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from grpo_worker.checkpoint import checksum_file
from grpo_worker.data.write import write_shuffled
from grpo_worker.demo.model import build_model
from grpo_worker.demo.tasks import Problem, split_problems, worked_response
from grpo_worker.demo.tokenizer import build_tokenizer
from grpo_worker.demo.warmup import Recipe, accuracy, greedy_responses, warm_up
from grpo_worker.errors import ConfigError, DataError
from grpo_worker.storage import whole_file

TRAIN_PROBLEMS = 1280
HELD_OUT_PROBLEMS = 256
# Greedy held-out accuracy after the warm-up: enough right answers to learn from, and far to go.
ACCURACY_WINDOW = (0.2, 0.55)
STAMP_FILE = "demo.json"
DEFAULT_SEED = 1


@dataclass(frozen=True)
class DemoPaths:
    """What `prepare_demo` made. `start_accuracy` is the greedy accuracy on the held-out problems, 0 to 1."""

    model: Path
    train: Path
    test: Path
    start_accuracy: float


def prepare_demo(
    directory: Path,
    seed: int = DEFAULT_SEED,
    *,
    recipe: Recipe | None = None,
    accuracy_window: tuple[float, float] = ACCURACY_WINDOW,
    report: Callable[[str], None] = lambda _: None,
) -> DemoPaths:
    """Model, train.parquet and test.parquet in `directory`; about a minute the first time, nothing to do the next.

    Raises:
        ConfigError: the directory cannot be written. DataError: the warm-up missed its accuracy window (another seed helps).
    """
    recipe = recipe or Recipe()
    model, train, test = directory / "model", directory / "train.parquet", directory / "test.parquet"
    digest = _digest(seed, recipe)
    stamp = _read_stamp(directory)
    if stamp and stamp.get("digest") == digest and _files_fit(directory, stamp.get("files")):
        report(f"{directory}: is up to date")
        return DemoPaths(model, train, test, float(stamp["start_accuracy"]))
    train_problems, held_out = split_problems(seed, TRAIN_PROBLEMS, HELD_OUT_PROBLEMS)
    staged = directory / ".tmp-model"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / STAMP_FILE).unlink(missing_ok=True)
        start_accuracy = _make_model(staged, held_out, seed, recipe, accuracy_window, report)
        shutil.rmtree(model, ignore_errors=True)
        os.rename(staged, model)
        write_shuffled(_table(train_problems), train, seed=seed, overwrite=True)
        write_shuffled(_table(held_out), test, seed=seed, overwrite=True)
        made = [train, test, *sorted(path for path in model.rglob("*") if path.is_file())]
        stamp = {
            "digest": digest,
            "seed": seed,
            "start_accuracy": start_accuracy,
            "files": {path.relative_to(directory).as_posix(): checksum_file(path) for path in made},
        }
        with whole_file(directory / STAMP_FILE) as temporary:
            temporary.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{directory}: the demo cannot be written: {error}. Choose another directory.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    report(f"{directory}: {len(train_problems)} training and {len(held_out)} held-out problems")
    return DemoPaths(model, train, test, start_accuracy)


def _make_model(
    target: Path,
    held_out: Sequence[Problem],
    seed: int,
    recipe: Recipe,
    accuracy_window: tuple[float, float],
    report: Callable[[str], None],
) -> float:
    """Build, warm up, check and save; the greedy accuracy on the held-out problems."""
    tokenizer, model = build_tokenizer(), build_model(seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report(f"supervised warm-up: {parameters:,} parameters, {recipe.steps} steps of {recipe.batch_size} problems ...")
    started = time.monotonic()
    loss = warm_up(model, tokenizer, held_out, seed, recipe)
    start_accuracy = accuracy(held_out, greedy_responses(model, tokenizer, held_out))
    report(
        f"done in {time.monotonic() - started:.0f} s: loss {loss:.3f}, greedy held-out accuracy {start_accuracy:.3f}"
    )
    low, high = accuracy_window
    if not low <= start_accuracy <= high:
        raise DataError(
            f"the warm-up with seed {seed} ended at a greedy accuracy of {start_accuracy:.3f}, outside {low}..{high}, "
            "so GRPO would have little to learn. Use another --seed."
        )
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(path.stat().st_mode | 0o644)  # weights are saved for their owner alone
    return start_accuracy


def _table(problems: Sequence[Problem]) -> pa.Table:
    return pa.table(
        {
            "prompt": [problem.prompt for problem in problems],
            "response": [worked_response(problem) for problem in problems],
            "reward": [problem.answer for problem in problems],
        }
    )


def _digest(seed: int, recipe: Recipe) -> str:
    """Of everything that the files follow from: this package's code, the recipe, the seed."""
    digest = xxhash.xxh3_64(repr((seed, recipe)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _read_stamp(directory: Path) -> dict[str, Any] | None:
    try:
        stamp = json.loads((directory / STAMP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def _files_fit(directory: Path, files: object) -> bool:
    if not isinstance(files, dict) or not files:
        return False
    return all(
        (directory / path).is_file() and checksum_file(directory / path) == saved for path, saved in files.items()
    )
