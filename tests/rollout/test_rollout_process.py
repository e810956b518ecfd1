"""The whole process: it registers, serves, and ends with the code and the reason of what ended it."""

import asyncio
import glob
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web
from replica_helpers import TOKEN, Loop, Replica, Trainer, request_of, weights
from transformers import Qwen3Config, Qwen3ForCausalLM

from grpo_worker.environment import COORDINATOR_URL, JOB_TOKEN, TERMINATION_LOG
from grpo_worker.protocol import codec
from grpo_worker.protocol.http import door
from grpo_worker.protocol.messages import Heartbeat, HeartbeatReply
from grpo_worker.rollout.server import listen


class Coordinator:
    """Answers heartbeats and remembers them."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.beats: list[Heartbeat] = []
        self.reply = HeartbeatReply(incarnation="one", policy_version=None, max_staleness=0)
        app = web.Application(middlewares=[door(TOKEN)])
        app.router.add_post("/v1/members", self._member)
        self._runner, self.port = loop.run(listen(app, "127.0.0.1", 0))

    async def _member(self, request: web.Request) -> web.Response:
        self.beats.append(codec.decode(await request.read(), Heartbeat))
        return web.Response(body=codec.encode(self.reply))

    def wait(
        self, condition: Callable[[Heartbeat], bool], process: subprocess.Popen[bytes], seconds: float = 300
    ) -> Heartbeat:
        """The first heartbeat from now on that meets the condition."""

        async def poll() -> Heartbeat:
            seen = len(self.beats)
            async with asyncio.timeout(seconds):
                while True:
                    assert process.poll() is None, "the replica ended"
                    for beat in self.beats[seen:]:
                        if condition(beat):
                            return beat
                    await asyncio.sleep(0.05)

        return self.loop.run(poll(), seconds + 5)

    def close(self) -> None:
        self.loop.run(self._runner.cleanup())


def start(
    tmp_path: Path, model: Path, coordinator_port: int, *, port: int = 0, context: int = 256, workers: int = 1
) -> subprocess.Popen[bytes]:
    document = {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {"name": "job"},
        "spec": {
            "model": {"path": str(model)},
            "data": {"trainFiles": ["t"], "maxPromptLength": context // 2, "maxResponseLength": context // 2},
            "reward": {"function": "gsm8k"},
            "rollout": {"tensorParallelSize": workers},
            "network": {"heartbeatSeconds": 0.1, "rolloutPort": port},
        },
    }
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(document))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        JOB_TOKEN: TOKEN,
        COORDINATOR_URL: f"http://127.0.0.1:{coordinator_port}",
        TERMINATION_LOG: str(tmp_path / "termination"),
    }
    command = [sys.executable, "-m", "grpo_worker.entrypoint", "rollout", "--job", str(job)]
    return subprocess.Popen(command, env=environment)


def last_word(tmp_path: Path, process: "subprocess.Popen[bytes]", seconds: float = 300) -> tuple[int, dict[str, str]]:
    process.wait(seconds)
    return process.returncode, json.loads((tmp_path / "termination").read_text())


def workers_of(process: int) -> list[int]:
    """The processes of tensor parallelism."""
    children = [Path(path).read_text().split() for path in glob.glob(f"/proc/{process}/task/*/children")]
    names = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in itertools.chain(*children)}
    found = [child for child, name in names.items() if b"resource_tracker" not in name]
    assert len(found) == 2
    return found


def test_a_replica_lives_from_starting_to_its_engines_death(
    tmp_path: Path, model_directory: Path, trainer: Trainer
) -> None:
    loop = Loop()
    with closing(Coordinator(loop)) as coordinator:
        process = start(tmp_path, model_directory, coordinator.port, workers=2)
        try:
            first = coordinator.wait(lambda beat: beat.state == "starting", process)
            replica = Replica(loop, None, first.url)  # type: ignore[arg-type]
            assert replica.get("/healthz") == (503, "the engine is loading the model\n")
            status, reply = loop.run(replica.post("/v1/generate", codec.encode(request_of({"a": [2]}))))
            assert (status, reply.reason) == (503, "Starting")

            beat = coordinator.wait(lambda beat: beat.state == "ready", process)
            assert beat.weight_version is None
            assert beat.instance == first.instance
            assert replica.get("/readyz") == (503, "the coordinator has no policy version yet\n")

            source = trainer.publish(100, weights(100))
            assert replica.apply(source)[0] == 200
            coordinator.reply = HeartbeatReply(incarnation="one", policy_version=100, max_staleness=0)
            beat = coordinator.wait(lambda beat: beat.weight_version == 100, process)
            assert beat.weight_digest == source.digest
            coordinator.wait(lambda _: replica_ready(beat.url), process)
            assert replica.generate(request_of({"a": [2]}, min_weight_version=100))["a"].error is None
            beat = coordinator.wait(lambda beat: beat.stats["generated_tokens_total"] >= 16, process)

            coordinator.reply = HeartbeatReply(incarnation="two", policy_version=100, max_staleness=0)
            coordinator.wait(lambda beat: beat.weight_version is None, process)
            assert replica.get("/readyz")[0] == 503
            assert replica.apply(source)[0] == 200
            coordinator.wait(lambda beat: beat.weight_version == 100, process)

            for worker in workers_of(process.pid)[:1]:
                os.kill(worker, signal.SIGKILL)
            code, word = last_word(tmp_path, process)
            assert code == 85
            assert word["reason"] == "EngineDead"
        finally:
            process.kill()


def replica_ready(url: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False


@pytest.mark.parametrize("how", ["signal", "coordinator"])
def test_a_replica_that_is_told_to_stop_ends_with_0_even_while_it_loads(
    tmp_path: Path, model_directory: Path, how: str
) -> None:
    with closing(Coordinator(Loop())) as coordinator:
        process = start(tmp_path, model_directory, coordinator.port)
        try:
            coordinator.wait(lambda beat: beat.state == "starting", process)
            if how == "signal":
                process.send_signal(signal.SIGTERM)
            else:
                coordinator.reply = HeartbeatReply(incarnation="one", policy_version=None, max_staleness=0, stop=True)
            assert last_word(tmp_path, process, 30) == (0, {"reason": "Completed", "message": ""})
            leaving = coordinator.beats[-1]
            told = ("failed", "rollout-0") if how == "signal" else ("starting", "")
            assert (leaving.state, leaving.terminating) == told  # the coordinator does not wait for its silence
        finally:
            process.kill()


def test_a_port_in_use_ends_the_process_before_the_model_is_loaded(tmp_path: Path, model_directory: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        code, word = last_word(tmp_path, start(tmp_path, model_directory, 1, port=port))
    assert (code, word["reason"]) == (78, "InvalidConfiguration")
    assert f"network.rolloutPort: port {port} of 127.0.0.1 is in use" in word["message"]


def test_too_little_memory_for_one_sequence_is_told_with_vllms_numbers(tmp_path: Path) -> None:
    """128 KiB of KV cache a token: 1 GiB holds 8192."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=64, num_key_value_heads=64,
        head_dim=128, max_position_embeddings=16384, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "wide")
    code, word = last_word(tmp_path, start(tmp_path, tmp_path / "wide", 1, context=16384))
    assert (code, word["reason"]) == (78, "InvalidConfiguration")
    for part in (
        "GiB KV cache is needed",
        "rollout.cpuKVCacheGiB (now 1)",
        "data.maxResponseLength (the engine's context is their sum, 16384 tokens)",
    ):
        assert part in word["message"]
