"""Tests of the Kubernetes parts run against a real API server, which the first of them builds with Go.

On a machine without Go they are skipped, and the summary says why; with GRPO_NEED_KUBERNETES set, as in CI, they fail in place of that.
"""

import os
import shutil
from pathlib import Path

import pytest

FOLDERS = ("kubernetes", "chart")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("go") is not None or os.environ.get("GRPO_NEED_KUBERNETES"):
        return
    skip = pytest.mark.skip(reason="no Go (1.26 or newer) to build kube-apiserver with; see docs/development.md")
    root = Path(__file__).parent
    for item in items:
        if item.path.relative_to(root).parts[0] in FOLDERS:
            item.add_marker(skip)
