"""What the commands of installed packages get from `grpo`.

Invariant: a package that adds commands shows a run as `grpo run` does without importing the worker: what it needs is handed to it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from grpo_worker.errors import ConfigError

if TYPE_CHECKING:
    from grpo_worker.local.view import View


class Tools:
    """Handed to the functions of the entry point group `grpo.commands`."""

    def watch_run(self, directory: Path, port: int, goes_on: Callable[[], bool]) -> None:
        """The page of `grpo watch`."""
        from grpo_worker.report.live import watch_run

        watch_run(directory, port, goes_on)

    def open_view(self, stream: TextIO) -> "View":
        """The view of `grpo run`. Raises ConfigError where rich is not installed."""
        try:
            from grpo_worker.local.view import open_view
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the live view needs rich ({error}): pip install rich; or leave the run unfollowed"
            ) from error
        return open_view(stream)
