"""The trainer process behind its door: order, refusals, probes, failures on any rank, and how it ends."""

import concurrent.futures
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from trainer_helpers import batch_message, options_for, save_tiny_model, single_rank

from grpo_worker.checkpoint import write_manifest
from grpo_worker.errors import ConfigError
from grpo_worker.ports import free_port
from grpo_worker.protocol import codec
from grpo_worker.protocol.messages import (
    Done,
    ErrorReply,
    LoadReply,
    LoadRequest,
    LogProbsReply,
    LogProbsRequest,
    PublishReply,
    PublishRequest,
    SaveReply,
    SaveRequest,
    SaveStatusReply,
    SaveStatusRequest,
    StopRequest,
    TrainerReply,
    UpdateReply,
    UpdateRequest,
)
from grpo_worker.trainer import loop
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.server import TrainerServer
from grpo_worker.weightsync.client import fetch_manifest

TOKEN = "secret"
LENGTHS = [(5, 7), (3, 20), (10, 4)]
LIMIT_SECONDS = 60.0


def post(url: str, request: Any, token: str = TOKEN) -> Any:
    body = request if isinstance(request, bytes) else codec.encode(request)
    http = urllib.request.Request(f"{url}/v1/trainer", data=body, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(http, timeout=LIMIT_SECONDS) as response:
            return codec.decode(response.read(), TrainerReply)
    except urllib.error.HTTPError as refusal:
        return msgspec.json.decode(refusal.read(), type=ErrorReply)


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=LIMIT_SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[TrainerEngine]:
    engine = TrainerEngine(options_for(model), single_rank(), TOKEN)
    yield engine
    engine.close()


@pytest.fixture
def trainer(engine: TrainerEngine) -> Iterator[tuple[str, concurrent.futures.Future[None]]]:
    """A served engine: its URL and the future of its loop. Ended with StopRequest if the test left it running."""
    server = TrainerServer(engine.options, TOKEN, engine.save_status)
    server.start()
    server.ready()
    ended: concurrent.futures.Future[None] = concurrent.futures.Future()

    def lead() -> None:
        try:
            ended.set_result(loop.lead(engine, server, engine.options, threading.Event()))
        except Exception as error:
            ended.set_exception(error)

    thread = threading.Thread(target=lead)
    thread.start()
    yield server.url, ended
    if not ended.done():
        post(server.url, StopRequest())
    thread.join(LIMIT_SECONDS)
    server.close()
    assert not thread.is_alive()


def test_a_step_over_http(trainer: tuple[str, Any], engine: TrainerEngine, tmp_path: Path) -> None:
    url, _ = trainer
    batch = batch_message(LENGTHS)
    scored = post(url, LogProbsRequest(batch=batch, actor=True, reference=False))
    assert isinstance(scored, LogProbsReply) and scored.log_probs is not None
    assert len(scored.log_probs.numpy()) == 31 and scored.ref_log_probs is None
    assert np.all(scored.log_probs.numpy() < 0)

    updated = post(url, UpdateRequest(step=1, batch=batch))
    assert isinstance(updated, UpdateReply)
    assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/grad_norm", "actor/lr"} <= set(updated.metrics)

    published = post(url, PublishRequest(version=1))
    assert isinstance(published, PublishReply)
    deadline = time.monotonic() + 10
    manifest = fetch_manifest(published.store, token=TOKEN, timeout_seconds=10, deadline=deadline)
    assert manifest.digest == published.store.digest and manifest.version == 1

    directory = tmp_path / "checkpoint"
    assert isinstance(post(url, SaveRequest(directory=str(directory), step=1)), SaveReply)
    saved = post(url, SaveStatusRequest(wait_seconds=LIMIT_SECONDS))
    assert isinstance(saved, SaveStatusReply) and saved.done and not saved.error
    assert "actor/model.safetensors" in saved.files and "state/.metadata" in saved.files
    write_manifest(directory, saved.files, epoch=0, step=1)
    assert post(url, LoadRequest(directory=str(directory))).step == 1

    status, metrics = get(f"{url}/metrics")
    assert status == 200
    assert "grpo_trainer_step 1.0" in metrics
    assert 'grpo_trainer_operations_total{operation="update"}' in metrics


def test_a_batch_that_does_not_fit_is_refused_and_the_trainer_goes_on(trainer: tuple[str, Any]) -> None:
    url, _ = trainer
    good = batch_message(LENGTHS)
    bad = type(good)(**{**{f: getattr(good, f) for f in good.__struct_fields__}, "advantages": good.prompt_lengths})
    reply = post(url, UpdateRequest(step=1, batch=bad))
    assert isinstance(reply, ErrorReply) and reply.recoverable and reply.exit_code == 65
    assert "batch.advantages: 3 values for 31 response tokens" in reply.message
    reply = post(url, LogProbsRequest(batch=good, actor=False, reference=True))
    assert isinstance(reply, ErrorReply) and "useKLLoss" in reply.message
    assert isinstance(post(url, LogProbsRequest(batch=good, actor=True, reference=False)), LogProbsReply)


def test_a_wrong_token_and_a_wrong_message_are_refused(trainer: tuple[str, Any]) -> None:
    url, _ = trainer
    assert post(url, StopRequest(), token="guess").reason == "Unauthorized"
    reply = post(url, b"\x81\xa4type\xa5dance")
    assert reply.reason == "InvalidRequest" and "dance" in reply.message
    assert get(f"{url}/healthz")[0] == 200 and get(f"{url}/readyz") == (200, "ready\n")


def test_a_write_that_fails_is_reported_and_the_trainer_goes_on(trainer: tuple[str, Any], tmp_path: Path) -> None:
    url, _ = trainer
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    assert isinstance(post(url, SaveRequest(directory=str(blocked / "checkpoint"), step=1)), SaveReply)
    status = post(url, SaveStatusRequest(wait_seconds=LIMIT_SECONDS))
    assert isinstance(status, SaveStatusReply) and status.done
    assert str(blocked) in status.error and "Not a directory" in status.error and status.files == {}
    assert isinstance(post(url, UpdateRequest(step=2, batch=batch_message(LENGTHS))), UpdateReply)
    assert isinstance(post(url, SaveRequest(directory=str(tmp_path / "good"), step=1)), SaveReply)
    assert post(url, SaveStatusRequest(wait_seconds=LIMIT_SECONDS)).error == ""


def test_a_full_disk_is_reported_with_its_reason(trainer: tuple[str, Any], tmp_path: Path) -> None:
    url, _ = trainer
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "rng-rank-0.pt").symlink_to("/dev/full")
    assert isinstance(post(url, SaveRequest(directory=str(tmp_path), step=1)), SaveReply)
    status = post(url, SaveStatusRequest(wait_seconds=LIMIT_SECONDS))
    assert status.done and str(tmp_path) in status.error and "No space left on device" in status.error


def test_a_shard_that_cannot_grow_is_reported_with_its_reason(trainer: tuple[str, Any], tmp_path: Path) -> None:
    url, _ = trainer
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # EFBIG takes the way that ENOSPC takes
    try:
        assert isinstance(post(url, SaveRequest(directory=str(tmp_path / "c"), step=1)), SaveReply)
        status = post(url, SaveStatusRequest(wait_seconds=LIMIT_SECONDS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status.done and str(tmp_path) in status.error and "File too large" in status.error
    assert isinstance(post(url, SaveRequest(directory=str(tmp_path / "c"), step=1)), SaveReply)
    assert post(url, SaveStatusRequest(wait_seconds=LIMIT_SECONDS)).error == ""


def test_a_damaged_checkpoint_is_refused_and_the_trainer_loads_another(
    trainer: tuple[str, Any], tmp_path: Path
) -> None:
    url, _ = trainer
    saved = [tmp_path / name for name in ("good", "changed", "gone")]
    for directory in saved:
        assert isinstance(post(url, SaveRequest(directory=str(directory), step=1)), SaveReply)
        files = post(url, SaveStatusRequest(wait_seconds=LIMIT_SECONDS)).files
        write_manifest(directory, files, epoch=0, step=1)
    shard = tmp_path / "changed/state/__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (tmp_path / "gone/state/trainer.json").unlink()
    for name, words in (
        ("changed", "state/__0_0.distcp: its content changed"),
        ("gone", "No such file"),
        ("none", "manifest.json is missing"),
    ):
        reply = post(url, LoadRequest(directory=str(tmp_path / name)))
        assert isinstance(reply, ErrorReply) and reply.recoverable
        assert (reply.reason, reply.exit_code) == ("CheckpointDamaged", 81)
        assert str(tmp_path / name) in reply.message and words in reply.message
    assert isinstance(post(url, LoadRequest(directory=str(tmp_path / "good"))), LoadReply)


def test_stop_ends_the_loop(trainer: tuple[str, Any]) -> None:
    url, ended = trainer
    assert isinstance(post(url, StopRequest()), Done)
    assert ended.result(LIMIT_SECONDS) is None


def test_a_port_in_use_names_its_field(engine: TrainerEngine, model: Path) -> None:
    first = TrainerServer(engine.options, TOKEN, engine.save_status)
    first.start()
    try:
        second = TrainerServer(options_for(model, network={"trainerPort": first.port}), TOKEN, engine.save_status)
        with pytest.raises(ConfigError, match=rf"network\.trainerPort: 127\.0\.0\.1:{first.port}"):
            second.start()
    finally:
        first.close()


@pytest.fixture
def two_ranks(model: Path, tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]", Path]]:
    """The real processes under their launcher: URL, launcher, and its log."""
    port, log = free_port(), tmp_path / "log"
    (tmp_path / "port").write_text(str(port))
    program = str(Path(__file__).with_name("rank_process.py"))
    code = (
        "import sys; from grpo_worker.trainer.launch import Placement, run_ranks;"
        f"sys.exit(run_ranks([sys.executable, {program!r}, {str(model)!r}, {str(tmp_path / 'port')!r}, 'serve'],"
        "Placement(nodes=1, ranks_per_node=2)))"
    )
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "GRPO_JOB_TOKEN": TOKEN}, stderr=output, stdout=output
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: launcher.poll() is not None or _is_ready(url))
        assert launcher.poll() is None, log.read_text()
        yield url, launcher, log
    finally:
        if launcher.poll() is None:
            launcher.terminate()
        launcher.wait(LIMIT_SECONDS)


def _is_ready(url: str) -> bool:
    try:
        return get(f"{url}/readyz")[0] == 200
    except OSError:
        return False


def _ranks(launcher: "subprocess.Popen[bytes]") -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return sorted(int(child) for child in children)


def test_two_rank_processes_serve_steps_until_one_dies(two_ranks: tuple[str, Any, Path]) -> None:
    url, launcher, _ = two_ranks
    assert isinstance(post(url, UpdateRequest(step=1, batch=batch_message(LENGTHS))), UpdateReply)
    pids = _ranks(launcher)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    assert launcher.wait(LIMIT_SECONDS) in (75, 137)
    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)


def test_sigterm_without_a_coordinator_ends_all_ranks_with_80(two_ranks: tuple[str, Any, Path]) -> None:
    _, launcher, log = two_ranks
    launcher.terminate()
    assert launcher.wait(LIMIT_SECONDS) == 80, log.read_text()
