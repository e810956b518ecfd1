"""Weights & Biases, online or with WANDB_MODE=offline.

Invariant: one run directory is one wandb run, whose id is kept in the directory; no call to wandb waits longer than its limit.
"""

import importlib
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_worker.errors import ConfigError

RUN_ID_FILE = "wandb_run_id"
START_TIMEOUT_SECONDS = 60.0
FINISH_TIMEOUT_SECONDS = 60.0


class WandbLogger:
    """Logs to the run whose id `<run_dir>/wandb_run_id` holds; a run that starts from step 0 gets a new id.

    A step that wandb has already (logged after the checkpoint that the run resumed from) is ignored by wandb.
    """

    name = "wandb"

    def __init__(
        self, run_dir: Path, project: str, experiment: str, config: Mapping[str, Any], resume_step: int
    ) -> None:
        wandb = _import_wandb()
        try:
            self._run = wandb.init(
                project=project,
                name=experiment,
                id=_run_id(run_dir, resume_step),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(init_timeout=START_TIMEOUT_SECONDS, silent=True),
            )
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise ConfigError(
                f"trainer.loggers: wandb cannot start: {error}. Run `wandb login`, set WANDB_MODE=offline, or remove it."
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({key: value for key, value in metrics.items() if key != "step"}, step=step)

    def close(self) -> None:
        """Upload what is left. Raises TimeoutError when that takes longer than the limit; the data stay in `wandb/`."""
        failures: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(FINISH_TIMEOUT_SECONDS)
        if thread.is_alive():
            raise TimeoutError(
                f"the upload took longer than {FINISH_TIMEOUT_SECONDS:.0f} s; `wandb sync` sends the rest"
            )
        if failures:
            raise failures[0]


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            "trainer.loggers: wandb is not installed. pip install 'grpo-operator[wandb]' or remove it"
        ) from error


def _run_id(run_dir: Path, resume_step: int) -> str:
    file = run_dir / RUN_ID_FILE
    if resume_step > 0 and file.is_file() and (stored := file.read_text(encoding="utf-8").strip()):
        return stored
    run_id = uuid.uuid4().hex[:12]
    file.write_text(run_id + "\n", encoding="utf-8")
    return run_id
