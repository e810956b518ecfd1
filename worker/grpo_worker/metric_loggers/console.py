"""One compact line a step on standard output.

Invariant: shows what the step's metrics hold and nothing else; a value that is not there is not shown.
"""

import sys
from collections.abc import Mapping
from typing import TextIO

from grpo_worker import logs
from grpo_worker.metric_loggers import names
from grpo_worker.metric_loggers.formatting import step_line


class ConsoleLogger:
    """Writes to `stream`, by default standard output as it is at the time of the call."""

    name = "console"

    def __init__(self, total_steps: int | None = None, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._stream = stream

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = step_line(
            step,
            total_steps=self._total_steps,
            epoch=names.finite(metrics.get("epoch")),
            reward=names.first_of(metrics, names.REWARD),
            accuracy=names.first_of(metrics, names.VALIDATION_ACCURACY + names.TRAIN_ACCURACY),
            response_length=names.first_of(metrics, names.RESPONSE_LENGTH),
            kl=names.first_of(metrics, names.KL),
            tokens_per_second=names.first_of(metrics, names.TOKENS_PER_SECOND),
            step_seconds=names.first_of(metrics, names.STEP_SECONDS),
        )
        print(logs.plain(line, step=step), file=self._stream or sys.stdout, flush=True)

    def close(self) -> None:
        return None
