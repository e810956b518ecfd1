"""A call to the trainer ends with its reply, its own error, or the news that it is lost, and soon."""

import asyncio
import time

import pytest
from coordinator_helpers import Trainer, World, heartbeats, world

from grpo_worker.coordinator.trainer_client import TrainerFailed, TrainerLost
from grpo_worker.errors import ExitCode
from grpo_worker.protocol import codec
from grpo_worker.protocol.messages import (
    ErrorReply,
    LoadReply,
    LoadRequest,
    PublishReply,
    PublishRequest,
    SaveReply,
    StopRequest,
)

pytestmark = pytest.mark.asyncio


async def publish(here: World) -> PublishReply:
    return await here.trainer_client.call(PublishRequest(version=1), PublishReply)


async def never(request: object) -> bytes:
    await asyncio.get_running_loop().create_future()
    return b""


async def test_a_reply_comes_back() -> None:
    async with world(version=None) as here:
        assert (await publish(here)).store.version == 1


async def test_a_trainer_that_dies_during_a_call_is_told_at_once() -> None:
    async with world(version=None, timeout_seconds=60.0) as here:
        here.trainer.answers[PublishRequest] = lambda request: None
        started = time.monotonic()
        with pytest.raises(TrainerLost, match=r"trainer-0 at http://127.0.0.1:.* was lost during publish") as caught:
            await publish(here)
        assert time.monotonic() - started < 2.0
        assert caught.value.exit_code is ExitCode.RETRY


async def test_a_trainer_that_restarted_is_not_ours_any_more() -> None:
    async with world(version=None, timeout_seconds=60.0) as here:
        here.trainer.answers[PublishRequest] = never
        call = asyncio.create_task(publish(here))
        while not here.trainer.calls:
            await asyncio.sleep(0)
        here.trainer.instance = "second"
        here.beat()
        with pytest.raises(TrainerLost, match="trainer-0 was started again during publish"):
            async with asyncio.timeout(5):
                await call


async def test_a_trainer_that_falls_silent_is_lost() -> None:
    async with world(version=None, timeout_seconds=60.0) as here:
        here.trainer.answers[PublishRequest] = never
        call = asyncio.create_task(publish(here))
        here.clock.pushed = 31.0
        with pytest.raises(
            TrainerLost, match=r"trainer-0 was silent for 31 s \(network.memberTimeoutSeconds\) during publish"
        ):
            async with asyncio.timeout(5):
                await call


async def test_an_operation_has_a_limit() -> None:
    async with world(version=None, timeout_seconds=0.2) as here:
        here.trainer.answers[PublishRequest] = never
        beats = asyncio.create_task(heartbeats(here))
        with pytest.raises(
            TrainerLost, match=r"trainer-0 did not finish publish in time: 0 s \(network\.requestTimeoutSeconds\)"
        ):
            await publish(here)
        beats.cancel()


@pytest.mark.parametrize(
    ("code", "expected"), [(85, ExitCode.DEVICE), (65, ExitCode.DATA), (1, ExitCode.RETRY), (-9, ExitCode.RETRY)]
)
async def test_the_trainers_own_error_keeps_its_reason_and_code(code: int, expected: ExitCode) -> None:
    async with world(version=None) as here:
        error = ErrorReply(reason="DeviceFailed", message="CUDA error", exit_code=code)
        here.trainer.answers[PublishRequest] = lambda request: error
        with pytest.raises(TrainerFailed, match="CUDA error") as caught:
            await publish(here)
    assert (caught.value.reason, caught.value.exit_code) == ("DeviceFailed", expected)


@pytest.mark.parametrize("body", [b"\xc1", b"", codec.encode({"type": "news"})])
async def test_an_answer_that_cannot_be_read_is_a_lost_trainer(body: bytes) -> None:
    async with world(version=None) as here:
        here.trainer.answers[PublishRequest] = lambda request: body
        with pytest.raises(TrainerLost, match="not the same version"):
            await publish(here)


async def test_an_answer_to_another_question_is_a_lost_trainer() -> None:
    async with world(version=None) as here:
        here.trainer.answers[PublishRequest] = lambda request: SaveReply(stall_seconds=0.0)
        with pytest.raises(TrainerLost, match=r"its answer cannot be read .*not the same version"):
            await publish(here)


async def test_calls_are_made_one_at_a_time() -> None:
    under_way = highest = 0

    async def count(request: LoadRequest) -> LoadReply:
        nonlocal under_way, highest
        under_way += 1
        highest = max(highest, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return LoadReply(step=1)

    async with world(version=None) as here:
        here.trainer.answers[LoadRequest] = count
        calls = (here.trainer_client.call(LoadRequest(directory="d"), LoadReply) for _ in range(4))
        await asyncio.gather(*calls)
    assert highest == 1


async def test_no_trainer_within_the_limit_is_told() -> None:
    async with world(version=None) as here:
        here.clock.pushed = 31.0
        with pytest.raises(TrainerLost, match="no trainer was ready within 0 s"):
            await here.trainer_client.connect(0.1)


async def test_stopping_a_trainer_that_is_gone_is_no_error() -> None:
    async with world(version=None) as here:
        await here.trainer_client.stop()
        assert isinstance(here.trainer.calls[-1], StopRequest)
        await here.trainer.stop()
        await here.trainer_client.stop()
        here.trainer = Trainer()
