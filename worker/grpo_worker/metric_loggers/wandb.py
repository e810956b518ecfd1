"""Weights & Biases, online or with WANDB_MODE=offline.

Invariants: a wandb run never shows steps that the training went back from: a resume that lost steps begins another wandb run, in the group
of the first. The id of the present one is kept in the run directory. No call to wandb waits longer than its limit.
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
    """Logs to the run whose id `<run_dir>/wandb_run_id` holds, when it goes on where that run ended; else to a new one.

    wandb keeps what it has, and ignores a step that is logged twice. To rewind a run takes its server, so it would not work offline.
    """

    name = "wandb"

    def __init__(
        self,
        run_dir: Path,
        project: str,
        experiment: str,
        config: Mapping[str, Any],
        resume_step: int,
        branches: bool = False,
    ) -> None:
        """`branches`: steps after `resume_step` were logged before, and are lost."""
        wandb = _import_wandb()
        ids = _run_ids(run_dir) if resume_step > 0 else []
        resumed_from = {"grpo_resumed_from": {"run": ids[-1], "step": resume_step}} if ids and branches else {}
        if not ids or branches:
            ids.append(uuid.uuid4().hex[:12])
            (run_dir / RUN_ID_FILE).write_text("\n".join(ids) + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=experiment,
                id=ids[-1],
                group=ids[0],
                resume="allow",
                dir=str(run_dir),
                config={**config, **resumed_from},
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


def _run_ids(run_dir: Path) -> list[str]:
    """The wandb runs of this training, the present one last."""
    file = run_dir / RUN_ID_FILE
    return file.read_text(encoding="utf-8").split() if file.is_file() else []
