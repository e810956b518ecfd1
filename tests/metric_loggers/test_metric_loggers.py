"""Metric loggers: what they write, what a resume keeps, and what a failing one does to training (nothing)."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_worker.errors import ConfigError
from grpo_worker.metric_loggers import MetricLoggers, open_loggers, read_events
from grpo_worker.metric_loggers.formatting import format_duration, format_number, sparkline
from grpo_worker.metric_loggers.step_files import JsonlLogger, SetAside
from grpo_worker.metric_loggers.tensorboard import TensorBoardLogger

METRICS = {
    "epoch": 0.4,
    "critic/score/mean": 0.412,
    "val/accuracy/pass@1": 0.53,
    "response_length/mean": 123.0,
    "actor/ppo_kl": 0.0012,
    "perf/throughput": 1234.4,
    "timing_s/step": 8.12,
}


def opened(names: list[str], run_dir: Path, resume_step: int = 0, **options: Any) -> MetricLoggers:
    return open_loggers(names, run_dir, "project", "experiment", {"lr": 1e-6}, resume_step, **options)


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def warnings(run_dir: Path) -> list[str]:
    return [event["message"] for event in read_events(run_dir / "events.jsonl")[0] if event["level"] == "warning"]


# --- jsonl ---


def test_jsonl_holds_one_object_a_step_that_is_there_at_once(tmp_path: Path) -> None:
    loggers = opened(["jsonl"], tmp_path)
    loggers.log(0, {"val/accuracy/pass@1": 0.1})
    loggers.log(1, METRICS)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "val/accuracy/pass@1": 0.1}, {"step": 1, **METRICS}]
    loggers.close()


def test_a_step_that_is_logged_again_replaces_its_line(tmp_path: Path) -> None:
    loggers = opened(["jsonl"], tmp_path)
    for step, value in [(0, 1.0), (1, 1.0), (0, 2.0)]:
        loggers.log(step, {"value": value})
    loggers.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 0, "value": 2.0}
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_json_does_not_know_become_null(tmp_path: Path, value: float) -> None:
    loggers = opened(["jsonl"], tmp_path)
    loggers.log(1, {"actor/grad_norm": value})
    loggers.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "actor/grad_norm": null}\n'


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    loggers = opened([], tmp_path)
    loggers._loggers.append(logger)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, logger.fileno())
    os.close(full)
    with pytest.raises(ConfigError, match=r"writing metrics\.jsonl failed: No space left on device.* Free space"):
        loggers.log(1, METRICS)
    loggers.close()


def test_a_file_that_is_no_file_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    loggers = opened(["jsonl", "console"], tmp_path)
    assert loggers.names == ["console"]
    assert "Logger jsonl could not be opened" in warnings(tmp_path)[0]


# --- console ---


def test_console_writes_one_compact_line_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loggers = opened(["console"], tmp_path, total_steps=200)
    loggers.log(12, METRICS)
    loggers.log(13, {"critic/score/mean": math.nan})
    loggers.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 12/200  epoch 0.40  reward 0.412  accuracy 0.530  length 123.0  KL 0.0012  1,234 tok/s  8.1 s"
    assert second == "step 13/200"


# --- tensorboard ---


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run_dir / "tensorboard" / "experiment"))
    reader.Reload()
    return [(scalar.step, pytest.approx(scalar.value)) for scalar in reader.Scalars(tag)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    loggers = opened(["tensorboard"], tmp_path)
    for step in range(6):
        loggers.log(step, {"critic/score/mean": 1.0})
    loggers.close()
    again = opened(["tensorboard"], tmp_path, resume_step=3)
    for step in range(4, 7):
        again.log(step, {"critic/score/mean": 2.0})
    again.close()
    expected = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert scalars(tmp_path, "critic/score/mean") == expected


def test_tensorboard_and_events_import_neither_torch_nor_tensorflow() -> None:
    code = (
        "import sys, grpo_worker.metric_loggers, grpo_worker.metric_loggers.tensorboard\n"
        "print([name for name in ('torch', 'tensorflow', 'wandb', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_a_logger_that_fails_is_switched_off_with_one_warning(tmp_path: Path) -> None:
    loggers = opened(["jsonl", "tensorboard"], tmp_path)
    (tensorboard,) = [logger for logger in loggers._loggers if isinstance(logger, TensorBoardLogger)]
    tensorboard._writer.close()
    for step in (1, 2):
        loggers.log(step, METRICS)
    assert loggers.names == ["jsonl"] and steps(tmp_path) == [1, 2]
    (warning,) = warnings(tmp_path)
    assert warning.startswith("Logger tensorboard stopped at step 1, training goes on: ValueError")
    loggers.close()
    loggers.close()


# --- wandb ---


def test_wandb_that_is_not_installed_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without("wandb"), *sys.meta_path])
    expected = r"^trainer\.loggers: wandb is not installed\. pip install 'grpo-operator\[wandb\]' or remove it$"
    with pytest.raises(ConfigError, match=expected):
        opened(["jsonl", "wandb"], tmp_path)


def test_wandb_offline_goes_on_with_the_same_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for resume_step in (0, 2):
        loggers = opened(["wandb"], tmp_path, resume_step)
        loggers.log(resume_step + 1, METRICS)
        loggers.close()
        ids.append((tmp_path / "wandb_run_id").read_text().strip())
    assert warnings(tmp_path) == []
    assert ids[0] == ids[1]
    # An offline run's folder is named offline-run-<second>-<id>: two starts within a second share it.
    assert all(path.name.endswith(ids[0]) for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))


def test_wandb_shows_no_step_that_the_training_went_back_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 to 3, then on from the checkpoint of step 1: another run of the same group begins there, as its config says."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    inits = recorded_inits(monkeypatch)
    lost = SetAside([], 2, 3)
    for steps_logged, options in (
        ((1, 2, 3), {}),
        ((2, 3), {"resume_step": 1, "lost": lost}),
        ((4,), {"resume_step": 3}),
    ):
        loggers = opened(["wandb"], tmp_path, **options)
        for step in steps_logged:
            loggers.log(step, METRICS)
        loggers.close()
    assert warnings(tmp_path) == []
    first, second, third = inits
    assert first["id"] != second["id"] == third["id"]
    assert first["group"] == second["group"] == third["group"] == first["id"]
    assert second["config"]["grpo_resumed_from"] == {"run": first["id"], "step": 1}
    assert "grpo_resumed_from" not in first["config"]


def recorded_inits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What wandb.init is called with from now on; it is called all the same."""
    wandb = importlib.import_module("wandb")
    real, calls = wandb.init, list[dict[str, Any]]()

    def init(**options: Any) -> Any:
        calls.append(options)
        return real(**options)

    monkeypatch.setattr(wandb, "init", init)
    return calls


class _Without:
    """An importer that knows one package to be missing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# --- all ---


def test_an_unknown_logger_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown logger 'tensorbord'\. Known: console, jsonl, tensorboard, wandb"):
        opened(["tensorbord"], tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0, "0.0 s"), (8.12, "8.1 s"), (59.97, "1 min 00 s"), (3599.6, "1 h 00 min"), (200, "3 min 20 s"), (187_200, "2 d 04 h")],
)  # fmt: skip
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.000"), (0.41234, "0.412"), (12345.6, "12,346"), (123.44, "123.4"), (3.1e-5, "3.1e-05"), (-0.5, "-0.500")],
)  # fmt: skip
def test_small_numbers_do_not_become_zeros(value: float | None, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [([], 5, ""), ([1.0], 5, "▄"), ([0, 1], 5, "▁█"), ([0, 0, 1, 1], 2, "▁█"), ([2.0] * 9, 3, "▄▄▄")],
)
def test_a_sparkline_fits_its_width(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line
