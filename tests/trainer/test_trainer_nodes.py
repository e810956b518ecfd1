"""A trainer of two nodes, as two pods run it: `grpo-worker trainer` on each, which meet at MASTER_ADDR over real Gloo."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from trainer_helpers import save_tiny_model

from grpo_worker.ports import free_port
from grpo_worker.protocol import codec
from grpo_worker.protocol.http import door
from grpo_worker.protocol.messages import Heartbeat, HeartbeatReply

TOKEN = "secret"
LIMIT_SECONDS = 240.0


class Coordinator:
    """Answers heartbeats in a thread of its own, and remembers them."""

    def __init__(self) -> None:
        self.beats: list[Heartbeat] = []
        self.stop = False
        self.port = 0
        self._started, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(30)

    async def _serve(self) -> None:
        app = web.Application(middlewares=[door(TOKEN)])
        app.router.add_post("/v1/members", self._member)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._started.set()
        await asyncio.to_thread(self._end.wait)
        await runner.cleanup()

    async def _member(self, request: web.Request) -> web.Response:
        self.beats.append(codec.decode(await request.read(), Heartbeat))
        reply = HeartbeatReply(incarnation="one", policy_version=None, max_staleness=0, stop=self.stop)
        return web.Response(body=codec.encode(reply))

    def close(self) -> None:
        self._end.set()
        self._thread.join(30)


@dataclass
class Cluster:
    """The processes, by node, and who they talk to."""

    coordinator: Coordinator
    nodes: list["subprocess.Popen[bytes]"]
    logs: list[Path]

    def wait_for(self, condition: Callable[[Heartbeat], bool]) -> Heartbeat:
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            if found := [beat for beat in self.coordinator.beats if condition(beat)]:
                return found[0]
            for node, log in zip(self.nodes, self.logs, strict=True):
                assert node.poll() is None, log.read_text()
            time.sleep(0.05)
        raise AssertionError("\n".join(log.read_text() for log in self.logs))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    model = save_tiny_model(tmp_path / "model")
    spec = {
        "model": {"path": str(model)},
        "data": {"trainFiles": ["none.parquet"], "maxPromptLength": 16, "maxResponseLength": 16},
        "reward": {"function": "gsm8k"},
        "trainer": {"nodes": 2},
        "runtime": {"device": "cpu"},
        "network": {"heartbeatSeconds": 0.1, "rendezvousPort": free_port()},
    }
    job = tmp_path / "job.yaml"
    document = {"apiVersion": "grpo.dev/v1alpha1", "kind": "GRPOJob", "metadata": {"name": "two"}, "spec": spec}
    job.write_text(yaml.safe_dump(document))
    coordinator = Coordinator()
    nodes, logs = [], [tmp_path / f"trainer-{node}.log" for node in range(2)]
    for node, log in enumerate(logs):
        environment = {
            **os.environ,
            "NODE_RANK": str(node),
            "MASTER_ADDR": "localhost",
            "GRPO_MEMBER_NAME": f"trainer-{node}",
            "GRPO_COORDINATOR_URL": f"http://127.0.0.1:{coordinator.port}",
            "GRPO_JOB_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "grpo_worker.entrypoint", "trainer", "--job", str(job)]
        with log.open("wb") as output:
            nodes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        yield Cluster(coordinator, nodes, logs)
    finally:
        for process in nodes:
            process.terminate()
        for process in nodes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        coordinator.close()


def test_an_evicted_node_is_told_to_the_coordinator_and_all_end_when_it_says_so(cluster: Cluster) -> None:
    ready = cluster.wait_for(lambda beat: beat.state == "ready")
    assert (ready.name, ready.terminating) == ("trainer-0", "")
    cluster.nodes[1].send_signal(signal.SIGTERM)
    told = cluster.wait_for(lambda beat: beat.terminating != "")
    assert (told.name, told.state, told.terminating) == ("trainer-0", "ready", "trainer-1")  # it can still save
    assert all(node.poll() is None for node in cluster.nodes)
    cluster.coordinator.stop = True
    assert [node.wait(LIMIT_SECONDS) for node in cluster.nodes] == [0, 0], [log.read_text() for log in cluster.logs]


def test_a_node_whose_partner_was_killed_ends_to_be_started_again(cluster: Cluster) -> None:
    cluster.wait_for(lambda beat: beat.state == "ready")
    children = Path(f"/proc/{cluster.nodes[1].pid}/task/{cluster.nodes[1].pid}/children").read_text().split()
    cluster.nodes[1].kill()
    for child in children:  # a node that is gone takes its ranks along
        os.kill(int(child), signal.SIGKILL)
    assert cluster.nodes[0].wait(LIMIT_SECONDS) == 75, cluster.logs[0].read_text()
