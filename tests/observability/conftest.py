"""Prometheus' own tools, from PATH."""

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def promtool() -> str:
    """Skipped without it; with GRPO_NEED_KUBERNETES set, as in CI, it has to be there."""
    found = shutil.which("promtool")
    if found is None:
        problem = "no promtool: apt-get install prometheus"
        pytest.fail(problem) if os.environ.get("GRPO_NEED_KUBERNETES") else pytest.skip(problem)
    return found
