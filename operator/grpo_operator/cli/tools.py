"""What `grpo` hands to the commands of an installed package.

Invariant: the operator's commands show a run by the same view as `grpo run` without importing it: the worker's command line injects it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO


class View(Protocol):
    """Shows a run until it is closed (see `grpo_worker.local.view`)."""

    def update(self, status: Mapping[str, Any] | None, events: Sequence[Any]) -> None:
        """Show the newest status, and the events that are new since the last call."""

    def close(self) -> None:
        """Leave the terminal as it was; the last state stays readable."""


class Tools(Protocol):
    """What `grpo_worker.cli` offers."""

    def watch_run(self, directory: Path, port: int, goes_on: Callable[[], bool]) -> None:
        """Serve the page of a run directory until interrupted; `goes_on` is asked before each new page. Raises GRPOError."""

    def open_view(self, stream: TextIO) -> View:
        """A live panel on a terminal, plain lines elsewhere."""
