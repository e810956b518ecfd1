"""Tests of the Kubernetes parts run against a real API server, which the first of them builds with Go.

On a machine without Go they are skipped, and the summary says why; with GRPO_NEED_KUBERNETES set, as in CI, they fail in place of that.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from e2e.cluster.build import build
from e2e.cluster.recipe import CONTROL_PLANE
from hypothesis import settings

FOLDERS = ("kubernetes", "chart")

# What the runs and loaders of these tests have converted and tokenised is of no use to a person's own.
_DATASETS = tempfile.TemporaryDirectory(prefix="grpo-datasets-")
os.environ["HF_DATASETS_CACHE"] = _DATASETS.name

# No limit on an example's time: on a busy machine it would judge the machine.
settings.register_profile("here", deadline=None)
settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("go") is not None or os.environ.get("GRPO_NEED_KUBERNETES"):
        return
    skip = pytest.mark.skip(reason="no Go (1.26 or newer) to build kube-apiserver with; see docs/development.md")
    for item in items:
        if _needs_kubernetes(item):
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the cache lacks before the first test: on a new machine that takes longer than a test may."""
    needed = [item for item in session.items if _needs_kubernetes(item) and item.get_closest_marker("skip") is None]
    if needed and not session.config.getoption("collectonly"):
        build([*CONTROL_PLANE, "helm", "kubeconform"])


def _needs_kubernetes(item: pytest.Item) -> bool:
    return any(item.path.is_relative_to(Path(__file__).parent / folder) for folder in FOLDERS)
