"""One real engine for the whole session, in an event loop of its own thread; a trainer's weight server beside it."""

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "weightsync"))  # its cutting proxy
os.environ.setdefault("OMP_NUM_THREADS", "1")

from replica_helpers import CONTEXT, TOKEN, Loop, Replica, Trainer, engine_options, tiny_model

from grpo_worker.rollout.engine import RolloutEngine
from grpo_worker.rollout.server import RolloutServer, listen


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process holds one engine at a time: the session's comes after the tests that make their own, and what it does not survive
    comes last."""

    def turn(item: pytest.Item) -> int:
        shares = "replica" in getattr(item, "fixturenames", ())
        return shares + (item.get_closest_marker("kills_the_engine") is not None)

    items.sort(key=turn)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kills_the_engine: runs after all other tests of the session's engine")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(0).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def trainer() -> Iterator[Trainer]:
    with closing(Trainer()) as trainer:
        yield trainer


@pytest.fixture(scope="session")
def replica(model_directory: Path) -> Iterator[Replica]:
    loop = Loop()

    async def start() -> tuple[RolloutEngine, int]:
        engine = RolloutEngine(engine_options(str(model_directory), CONTEXT, max_num_seqs=64))
        await engine.start()
        server = RolloutServer(engine, token=TOKEN, unready_reason=lambda: "")
        server.started = True
        _, port = await listen(server.app(), "127.0.0.1", 0)
        return engine, port

    engine, port = loop.run(start(), 400)
    yield Replica(loop, engine, f"http://127.0.0.1:{port}")
    engine.shutdown()
