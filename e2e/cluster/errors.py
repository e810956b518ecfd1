"""The one error of this package: it says what was missing or went wrong, and shows the end of the log that knows why."""

from pathlib import Path

LOG_TAIL_LINES = 25


class ClusterError(Exception):
    """The cluster cannot be built, started, used or ended as asked."""


def log_tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The end of a log, headed by its path, for an error message."""
    try:
        text = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"({path}: {error.strerror})"
    return "\n".join([f"--- the end of {path} ---", *text[-lines:]])
