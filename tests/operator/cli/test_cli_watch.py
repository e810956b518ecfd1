"""`grpo watch JOB`: what goes wrong while a page follows a job is said once, and again when it comes again."""

from pathlib import Path
from typing import Any, cast

import pytest

from grpo_operator.cli.api_errors import Unreachable
from grpo_operator.cli.cluster import Cluster
from grpo_operator.cli.watch import RunCopy


class Answers:
    """A cluster whose API server is there, or is away."""

    namespace = "team-a"

    def __init__(self, *there: bool) -> None:
        self._there = list(there)

    def job(self, namespace: str, name: str) -> dict[str, Any]:
        if not self._there.pop(0):
            raise Unreachable("no answer from the API server")
        return {"status": {"state": "Training"}}

    def pods(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        return []


def test_an_outage_is_said_once_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = RunCopy(cast(Cluster, Answers(False, False, False, True, False)), "math", tmp_path)
    assert [copy.goes_on() for _ in range(5)] == [True] * 5
    assert capsys.readouterr().err.splitlines() == ["grpo: no answer from the API server"] * 2
