"""`grpo report RUN`: one self-contained HTML page and one PNG of a run directory.

Invariant: a report only reads the run directory; a file that is missing or damaged costs its section and is named, nothing else.
"""

from grpo_worker.report.write import write_report

__all__ = ["write_report"]
