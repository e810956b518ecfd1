"""The launcher of a node's ranks: who ends whom, and with which code."""

import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_worker.errors import ConfigError
from grpo_worker.trainer import launch
from grpo_worker.trainer.launch import Placement, placement, run_ranks


def run(program: str, ranks: int = 2, stop: threading.Event | None = None, **place: object) -> int:
    where = Placement(nodes=1, ranks_per_node=ranks) if not place else Placement(**place)  # type: ignore[arg-type]
    return run_ranks([sys.executable, "-c", program], where, stop or threading.Event())


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    program = (
        "import os, pathlib; names = 'RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT'.split();"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(' '.join(os.environ[n] for n in names))"
    )
    code = run(program, nodes=2, ranks_per_node=2, node_rank=1, master_address="node-0", master_port=29500)
    assert code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    assert (tmp_path / "3").read_text() == "3 1 4 node-0 29500"


def test_the_first_failure_is_the_code_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "REPORT_GRACE_SECONDS", 0.2)
    program = "import os, sys, time; sys.exit(85) if os.environ['RANK'] == '1' else time.sleep(60)"
    started = time.monotonic()
    assert run(program) == 85
    assert time.monotonic() - started < 30


def test_a_rank_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "REPORT_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(launch, "TERMINATE_GRACE_SECONDS", 0.5)
    ready = tmp_path / "ready"
    program = (
        "import os, pathlib, signal, sys, time\n"
        f"ready = pathlib.Path({str(ready)!r})\n"
        "if os.environ['RANK'] == '0':\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN); ready.touch(); time.sleep(60)\n"
        "while not ready.exists(): time.sleep(0.01)\n"
        "sys.exit(75)\n"
    )
    assert run(program) == 75


def test_a_rank_killed_by_a_signal_ends_the_node_with_128_and_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "REPORT_GRACE_SECONDS", 0.2)
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ranks=1) == 128 + signal.SIGKILL


def test_stop_is_forwarded_as_sigterm(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\n"
        "time.sleep(60)\n"
    )
    stop = threading.Event()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(program, stop=stop)))
    thread.start()
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stop.set()
    thread.join(30)
    assert codes == [0]


PLACES = [
    ((1, 4, 0), {}, Placement(1, 4)),
    ((1, 4, 0), {"MASTER_PORT": "1234"}, Placement(1, 4, master_port=1234)),
    ((2, 8, 29500), {"MASTER_ADDR": "a", "NODE_RANK": "1"}, Placement(2, 8, 1, "a", 29500)),
    ((2, 8, 29500), {"MASTER_ADDR": "a", "JOB_COMPLETION_INDEX": "1"}, Placement(2, 8, 1, "a", 29500)),
]


@pytest.mark.parametrize(("job", "environment", "expected"), PLACES)
def test_place_of_a_node(job: tuple[int, int, int], environment: dict[str, str], expected: Placement) -> None:
    assert placement(*job, environment) == expected


@pytest.mark.parametrize(
    ("job", "environment", "words"),
    [
        ((2, 8, 29500), {}, "MASTER_ADDR"),
        ((2, 8, 0), {"MASTER_ADDR": "a"}, "network.rendezvousPort"),
        ((2, 8, 1), {"MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK: 2"),
    ],
)
def test_a_place_that_cannot_be_is_refused(job: tuple[int, int, int], environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        placement(*job, environment)


def test_the_launcher_costs_no_torch() -> None:
    program = "import sys, grpo_worker.trainer.main; sys.exit('torch' in sys.modules)"
    assert run(program, ranks=1) == 0
