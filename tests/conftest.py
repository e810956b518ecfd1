"""Tests of the Kubernetes parts run against a real API server, which the first of them builds with Go.

On a machine without Go they are skipped, and the summary says why; with GRPO_NEED_KUBERNETES set, as in CI, they fail in place of that.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster.build import build
from e2e.cluster.recipe import CONTROL_PLANE

TESTS = Path(__file__).parent
FOLDERS = ("kubernetes", "chart")
LONG = ("run", "kubernetes", "rollout", "trainer", "coordinator")  # begun first, so that two processes end together


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes (`pytest -n 2 --no-loadscope-reorder`) one has a whole folder, and with it what its session's fixtures start."""
    from xdist.scheduler import LoadScopeScheduling

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.split("/")[1]

    return Folders(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(_folder(item)) if _folder(item) in LONG else len(LONG))
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


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""


def _needs_kubernetes(item: pytest.Item) -> bool:
    return _folder(item) in FOLDERS
