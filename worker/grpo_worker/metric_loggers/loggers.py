"""The loggers of one run behind one call.

Invariant: a logger that fails is switched off with one warning and the others go on; only a ConfigError of metrics.jsonl (its disk is
full) reaches the caller.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_worker.errors import ConfigError
from grpo_worker.metric_loggers.console import ConsoleLogger
from grpo_worker.metric_loggers.events import EventLog
from grpo_worker.metric_loggers.step_files import JsonlLogger, SetAside

KNOWN = ("console", "jsonl", "tensorboard", "wandb")


class MetricLogger(Protocol):
    """One destination of metrics."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricLoggers:
    """Hands each step's metrics to every logger that still works."""

    def __init__(self, loggers: Sequence[MetricLogger], events: EventLog) -> None:
        self._loggers = list(loggers)
        self._events = events

    @property
    def names(self) -> list[str]:
        """The loggers that still work."""
        return [logger.name for logger in self._loggers]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step. Raises ConfigError when metrics.jsonl has no space left."""
        for logger in list(self._loggers):
            try:
                logger.log(step, metrics)
            except ConfigError:
                raise
            except Exception as error:
                self._loggers.remove(logger)
                self._warn(logger.name, f"stopped at step {step}", error)

    def close(self) -> None:
        """Close every logger. May be called twice."""
        loggers, self._loggers = self._loggers, []
        for logger in loggers:
            try:
                logger.close()
            except Exception as error:
                self._warn(logger.name, "did not close cleanly", error)

    def _warn(self, name: str, what: str, error: Exception) -> None:
        self._events.emit(
            "warning", "LoggerFailed", f"Logger {name} {what}, training goes on: {type(error).__name__}: {error}"
        )


def open_loggers(
    names: Sequence[str],
    run_dir: Path,
    project: str,
    experiment: str,
    config: Mapping[str, Any],
    resume_step: int,
    *,
    lost: SetAside | None = None,
    total_steps: int | None = None,
    events: EventLog | None = None,
) -> MetricLoggers:
    """Open the loggers of `spec.trainer.loggers`.

    Args:
        resume_step: the last step whose metrics are kept; 0 keeps only the validation before training, -1 nothing.
        lost: what was logged after that step before, and has been set aside.
        total_steps: shown by the console logger.
        events: where failures are told; default `<run_dir>/events.jsonl`.

    Raises:
        ConfigError: an unknown name, a package that is not installed, a run directory that cannot be written.
    """
    if unknown := [name for name in names if name not in KNOWN]:
        raise ConfigError(f"trainer.loggers: unknown logger {unknown[0]!r}. Known: {', '.join(KNOWN)}.")
    events = events or EventLog(run_dir / "events.jsonl", "coordinator")
    openers: dict[str, Callable[[], MetricLogger]] = {
        "console": lambda: ConsoleLogger(total_steps),
        "jsonl": lambda: JsonlLogger(run_dir),
        "tensorboard": lambda: _open_tensorboard(run_dir, experiment, resume_step),
        "wandb": lambda: _open_wandb(run_dir, project, experiment, config, resume_step, lost),
    }
    opened = MetricLoggers([], events)
    for name in dict.fromkeys(names):
        try:
            opened._loggers.append(openers[name]())
        except ConfigError:
            opened.close()
            raise
        except Exception as error:
            opened._warn(name, "could not be opened", error)
    return opened


def _open_tensorboard(run_dir: Path, experiment: str, resume_step: int) -> MetricLogger:
    try:
        from grpo_worker.metric_loggers.tensorboard import TensorBoardLogger
    except ImportError as error:
        raise ConfigError(
            "trainer.loggers: tensorboard is not installed. pip install 'grpo-operator[worker]' or remove it"
        ) from error
    return TensorBoardLogger(run_dir, experiment, resume_step)


def _open_wandb(
    run_dir: Path, project: str, experiment: str, config: Mapping[str, Any], resume_step: int, lost: SetAside | None
) -> MetricLogger:
    from grpo_worker.metric_loggers.wandb import WandbLogger

    return WandbLogger(run_dir, project, experiment, config, resume_step, lost is not None)
