"""From a run directory to its two files.

Invariant: report.html and report.png appear whole or not at all, beside the run's other files.
"""

from collections.abc import Callable
from pathlib import Path

from grpo_worker.errors import ConfigError
from grpo_worker.report.curves import make_charts
from grpo_worker.report.page import render_page
from grpo_worker.report.png import write_png
from grpo_worker.report.run_data import read_run
from grpo_worker.report.summary import summarize
from grpo_worker.storage import whole_file


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.png` into the run directory and return their paths.

    Raises:
        DataError: the directory is missing or holds no metrics.
        ConfigError: the files cannot be written.
    """
    run = read_run(run_dir)
    charts = make_charts(run.metrics)
    summary = summarize(run)
    html_path, png_path = run_dir / "report.html", run_dir / "report.png"
    page = render_page(run, summary, charts)
    write_whole(html_path, lambda path: path.write_text(page, encoding="utf-8", errors="replace"))
    write_whole(png_path, lambda path: write_png(path, summary.headline, charts))
    return html_path, png_path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The file that `write` makes at the path it is given. Raises ConfigError."""
    try:
        with whole_file(path) as temporary:
            write(temporary)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Free space or make the run directory writable.") from error
