"""`grpo watch`: the report as a page that a browser loads again while the run goes on.

Invariant: the page is the report's own, made anew when the run's files have changed; it never changes the run.
"""

import fcntl
import time
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from threading import Lock

from grpo_worker.errors import DataError
from grpo_worker.pages import serve_pages
from grpo_worker.report.curves import make_charts
from grpo_worker.report.page import render_page
from grpo_worker.report.run_data import read_run
from grpo_worker.report.summary import summarize
from grpo_worker.run_directory import RunDirectory

REFRESH_SECONDS = 5


def watch_run(directory: Path, port: int, goes_on: Callable[[], bool] | None = None) -> None:
    """Serve the page of a run until interrupted.

    Args:
        port: 0 for any free one.
        goes_on: asked before each new page; default: whether a `grpo run` has the directory.

    Raises:
        DataError: no such directory. ConfigError: the port is in use.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such run directory. `grpo run` makes runs/NAME.")
    page = LivePage(directory, goes_on or partial(runs_now, directory))
    with serve_pages("--port", port, "text/html; charset=utf-8", {"/": page.text}) as address:
        print(f"{directory.name}: {address}  (Ctrl-C ends it, not the run)", flush=True)
        while True:
            time.sleep(3600)


def runs_now(directory: Path) -> bool:
    """Whether a `grpo run` has the directory."""
    try:
        with RunDirectory(directory).lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class LivePage:
    """The newest page; made once for all who ask in the same seconds."""

    def __init__(self, directory: Path, goes_on: Callable[[], bool]) -> None:
        self._directory = directory
        self._goes_on = goes_on
        self._lock = Lock()
        self._text, self._made_at = "", float("-inf")

    def text(self) -> str:
        with self._lock:
            if time.monotonic() - self._made_at >= REFRESH_SECONDS / 2:
                self._text = self._render(REFRESH_SECONDS if self._goes_on() else None)
                self._made_at = time.monotonic()
            return self._text

    def _render(self, refresh_seconds: int | None) -> str:
        try:
            run = read_run(self._directory)
        except DataError as error:  # before the first step
            again = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
            return f"<!doctype html><title>{escape(self._directory.name)}</title>{again}<p>{escape(str(error))}</p>"
        return render_page(run, summarize(run), make_charts(run.metrics), refresh_seconds)
