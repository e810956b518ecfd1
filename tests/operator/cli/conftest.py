"""The `grpo` command with the cluster commands in it, whether or not the installed package declares them."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from grpo_operator.cli import add_commands
from grpo_worker.cli import main


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], int]:
    monkeypatch.setattr(main, "entry_points", lambda group: [SimpleNamespace(load=lambda: add_commands)])
    return main.call
