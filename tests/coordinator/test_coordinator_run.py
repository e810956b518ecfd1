"""The whole coordinator, with real data, rewards, checkpoints and HTTP; trainer and engines are stand-ins that speak the protocol.

What is counted here is prompts: over engines that die, stops and resumes, each prompt of each epoch is trained exactly once.
"""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from coordinator_helpers import TOKEN, Engine, answer, good, published
from coordinator_stage import BATCH, EPOCHS, PROMPTS, Stage, once_an_epoch

from grpo_worker.coordinator.trainer_client import TrainerLost
from grpo_worker.errors import ConfigError, DataError, YieldedError
from grpo_worker.protocol.auth import authorization
from grpo_worker.protocol.heartbeat import HeartbeatClient
from grpo_worker.protocol.messages import (
    ApplyWeightsRequest,
    ErrorReply,
    GenerateRequest,
    LogProbsRequest,
    PublishRequest,
    StopRequest,
    UpdateRequest,
)

pytestmark = pytest.mark.asyncio


class DiesInTheSecondBroadcast(Engine):
    """And comes back as a new process, which takes weights from the store."""

    back_as = "ready"

    async def pull(self, request: ApplyWeightsRequest) -> str:
        if request.group is not None and request.version == 2:
            self.restart()
            self.state = self.back_as
            await asyncio.sleep(0.2)  # heartbeats have told of the new process
            raise ConnectionResetError
        return await super().pull(request)


@pytest.mark.parametrize("staleness", [0, 1])
async def test_a_version_that_was_lost_on_its_way_to_the_only_engine_does_not_end_the_run(
    stage: Stage, staleness: int
) -> None:
    engine = DiesInTheSecondBroadcast("rollout-0")
    async with stage.members(engine):
        plain = stage.trainer.update

        async def update(request: UpdateRequest) -> Any:
            if staleness and request.step == 2:  # the third step's answers are there before the engine dies
                while len(engine.answered) < 3 * BATCH:
                    await asyncio.sleep(0.01)
            if staleness and request.step == 3:  # and its successor is up after the third update alone
                asyncio.get_running_loop().call_later(0.5, setattr, engine, "state", "ready")
            return plain(request)

        stage.trainer.answers[UpdateRequest] = update
        if staleness:
            engine.back_as = "starting"

        def publish(request: PublishRequest) -> Any:
            newest = stage.trainer.steps[-1] if stage.trainer.steps else 0
            if request.version != newest:
                return ErrorReply(reason="VersionNotHeld", message="gone", exit_code=75, recoverable=True)
            return published(request)

        stage.trainer.answers[PublishRequest] = publish
        await stage.train(stage.job(rollout={"maxStaleness": staleness}, network={"weightSync": "nccl"}))
    assert once_an_epoch(stage.trained())
    engines = [line["weight_sync/engines"] for line in stage.records("metrics.jsonl")]
    assert engines.count(0) == 1 + staleness, "version 2, and the one that followed while no engine was there"
    assert len(engines) == PROMPTS * EPOCHS // BATCH
    (failed,) = [event for event in stage.records("events.jsonl") if event["reason"] == "WeightGroupFailed"]
    assert "0 of 1 engines took version 2" in failed["message"]


async def dies_now_and_then(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:  # fmt: skip
    """Every other request is cut off after its first answer."""
    if len(engine.requests) % 2:
        await engine.write(stream, answer(request.prompts[0], request.sampling.n, engine.version))
        assert http.transport is not None
        http.transport.abort()
        return
    await good(engine, stream, http, request)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("second", [good, dies_now_and_then], ids=lambda behaviour: behaviour.__name__)
async def test_each_prompt_is_trained_exactly_once_an_epoch(stage: Stage, staleness: int, second: Any) -> None:
    async with stage.members(Engine("rollout-0"), Engine("rollout-1", second)):
        await stage.train(stage.job(rollout={"n": 2, "maxStaleness": staleness, "maxAttempts": 50}))
    steps = PROMPTS * EPOCHS // BATCH
    assert once_an_epoch(stage.trained())
    assert stage.trainer.steps == list(range(1, steps + 1))
    metrics = stage.records("metrics.jsonl")
    assert [line["step"] for line in metrics] == stage.trainer.steps
    startup = {name.removeprefix("startup_s/"): value for name, value in metrics[0].items() if "startup_s/" in name}
    assert startup.keys() == {
        "process", "model", "data", "rewards", "trainer", "resume", "publish", "engines", "first_step", "total",
    }  # fmt: skip
    assert 0 < sum(startup.values()) - startup["total"] <= startup["total"]  # parts of it, one after another
    assert not any(name.startswith("startup_s/") for line in metrics[1:] for name in line)
    assert max(line["training/off_policy/trajectory_staleness/max"] for line in metrics) <= staleness
    assert list((stage.root / "run" / "checkpoints").glob(f"epoch_*_step_{steps}"))


@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_run_that_was_stopped_goes_on_without_losing_or_repeating_a_prompt(
    stage: Stage, staleness: int
) -> None:
    job = stage.job(rollout={"n": 2, "maxStaleness": staleness, "maxAttempts": 50})
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update

        async def stop_at_the_seventh(request: UpdateRequest) -> Any:
            if request.step == 7:
                async with aiohttp.ClientSession() as session:
                    await session.post(f"{stage.url}/v1/stop", headers=authorization(TOKEN))
            return update(request)

        stage.trainer.answers[UpdateRequest] = stop_at_the_seventh
        with pytest.raises(YieldedError, match="stopped after step 7 of 12"):
            await stage.train(job)
        assert len(stage.trained()) == 7 * BATCH
    async with stage.members(Engine("rollout-0")):
        await stage.train(job)
    assert stage.trainer.steps == [8, 9, 10, 11, 12]
    assert once_an_epoch(stage.trained())
    assert [line["step"] for line in stage.records("metrics.jsonl")] == list(range(1, 13))


@pytest.mark.parametrize(
    ("actor", "passes"), [({}, 0), ({"recomputeOldLogProbs": "always"}, 12), ({"ppoMiniBatchSize": 2}, 12)], ids=str
)
async def test_a_step_of_one_update_asks_for_no_log_probs_before_it(
    stage: Stage, actor: dict[str, Any], passes: int
) -> None:
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job(actor={"ppoMiniBatchSize": BATCH} | actor))
        calls = stage.trainer.calls
    updates = [call.batch for call in calls if isinstance(call, UpdateRequest)]
    assert len(updates) == 12
    assert sum(isinstance(call, LogProbsRequest) for call in calls) == passes
    for batch in updates:
        assert (batch.old_log_probs is None) == (batch.is_weights is None) == (passes == 0)
        assert (batch.rollout_log_probs is None) == (passes > 0)
    assert all(("timing_s/old_log_prob" in record) == (passes > 0) for record in stage.records("metrics.jsonl"))


@pytest.mark.parametrize("staleness", [0, 1])
async def test_off_policy_the_next_step_is_made_while_the_engines_take_the_weights(
    stage: Stage, staleness: int
) -> None:
    """Version 3 is held back until the trainer was asked for step 4, which on-policy never happens."""
    slow = Engine("rollout-0")
    async with stage.members(slow):
        update, held = stage.trainer.update, asyncio.Event()

        def made(request: UpdateRequest) -> Any:
            if request.step == 3:
                slow.hang_at_sync = True
            elif request.step == 4:
                slow.hang_at_sync = False
                slow.released.set()
                held.set()
            return update(request)

        stage.trainer.answers[UpdateRequest] = made
        training = asyncio.create_task(stage.train(stage.job(rollout={"n": 2, "maxStaleness": staleness})))
        async with asyncio.timeout(20):
            while 3 not in slow.syncs:
                await asyncio.sleep(0.01)
        if staleness == 0:
            await asyncio.sleep(0.3)
            assert stage.trainer.steps == [1, 2, 3]
            slow.hang_at_sync = False
            slow.released.set()
        await training
        assert held.is_set()
        assert slow.syncs == list(range(13))
    assert once_an_epoch(stage.trained())


async def test_a_start_from_nothing_keeps_what_an_earlier_run_wrote(stage: Stage) -> None:
    """A mistyped checkpoint.path is enough for such a start."""
    (stage.root / "run").mkdir()
    names = ("metrics", "ledger", "samples")
    earlier = {name: f'{{"step": 7, "of": "{name}"}}\n' for name in names}
    for name in names:
        (stage.root / "run" / f"{name}.jsonl").write_text(earlier[name])
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job())
    assert {name: (stage.root / "run" / f"{name}.1.jsonl").read_text() for name in names} == earlier
    assert [line["step"] for line in stage.records("metrics.jsonl")] == stage.trainer.steps
    told = next(event for event in stage.records("events.jsonl") if event["reason"] == "RecordsSetAside")
    assert told["level"] == "warning"
    assert "an earlier run" in told["message"]
    assert "steps 7 to 7 are kept in metrics.1.jsonl, ledger.1.jsonl, samples.1.jsonl" in told["message"]


async def test_a_run_whose_trainer_died_goes_on_from_its_last_checkpoint(stage: Stage) -> None:
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update
        stage.trainer.answers[UpdateRequest] = lambda request: None if request.step == 8 else update(request)
        with pytest.raises(TrainerLost, match="was lost during update"):
            await stage.train(stage.job())
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job())
    assert stage.trainer.steps == list(range(6, 13))
    assert once_an_epoch(stage.trained())


async def test_a_reward_function_that_always_fails_stops_the_run_at_its_first_step(stage: Stage) -> None:
    job = stage.job(reward={"function": f"{stage.rewards}:broken"})
    async with stage.members(Engine("rollout-0")):
        with pytest.raises(DataError, match=r"(?s)reward\.function.*the verifier is broken"):
            await stage.train(job)
    assert stage.trainer.steps == []


async def test_the_members_are_told_when_the_run_is_over(stage: Stage) -> None:
    job = stage.job(trainer={"totalEpochs": EPOCHS, "totalSteps": 1, "testFreq": 0, "loggers": ["jsonl"]})
    async with stage.members(Engine("rollout-0")):
        engine = stage.engines[0]
        client = HeartbeatClient(stage.url, TOKEN, 0.02, engine.beat)
        beats = asyncio.create_task(client.run())
        await stage.train(job)
        beats.cancel()
    assert client.reply is not None
    assert client.reply.stop
    events = [event["reason"] for event in stage.records("events.jsonl")]
    assert events[-1] == "Succeeded"


AGENTS = """
async def two_turns(episode, *, hint):
    await episode.generate(max_tokens=3)
    episode.observe(hint)
    await episode.generate(max_tokens=3)


async def raises(episode):
    raise KeyError("no such tool")


def not_async(episode):
    pass
"""


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    path = tmp_path / "my_agents.py"
    path.write_text(AGENTS)
    return path


@pytest.mark.parametrize("staleness", [0, 2])
async def test_an_agents_prompts_are_trained_exactly_once_an_epoch(stage: Stage, agents: Path, staleness: int) -> None:
    rollout = {"n": 2, "maxStaleness": staleness, "maxAttempts": 50, "agent": f"{agents}:two_turns", "agentOptions": {"hint": "+-"}}  # fmt: skip
    train = str(stage.root / "train.parquet")
    job = stage.job(
        rollout=rollout,
        data={"trainFiles": [train], "validationFiles": [train], "trainBatchSize": BATCH, "maxPromptLength": 16},
    )
    async with stage.members(Engine("rollout-0"), Engine("rollout-1", dies_now_and_then)):
        batches = stage.keep_batches()
        await stage.train(job)
    assert once_an_epoch(stage.trained())
    for batch in batches:
        assert set(batch.response_lengths.numpy().tolist()) == {8}
        assert batch.response_mask.numpy().tolist() == [1, 1, 1, 0, 0, 1, 1, 1] * (BATCH * 2)
    validation = [record for record in stage.records("samples.jsonl") if record["kind"] == "validation"]
    assert validation and all("+-" in record["response"] for record in validation)
    metrics = [line for line in stage.records("metrics.jsonl") if line["step"] > 0]
    assert {line["agent/observed_tokens/max"] for line in metrics} == {2}
    assert max(line["training/off_policy/trajectory_staleness/max"] for line in metrics) <= staleness


async def test_an_agent_that_always_raises_stops_the_run_at_its_first_step(stage: Stage, agents: Path) -> None:
    async with stage.members(Engine("rollout-0")):
        with pytest.raises(
            DataError, match=r"(?s)none of its 4 prompts.*e0-f0-r.*rollout\.agent: .*raises.*KeyError: 'no such tool'"
        ):
            await stage.train(stage.job(rollout={"n": 2, "agent": f"{agents}:raises"}))
    assert stage.trainer.steps == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rollout": {"agent": "my_agents.py:not_async"}}, DataError, r"rollout\.agent: .*is not async"),
        (
            {"rollout": {"agent": "my_agents.py:two_turns", "agentOptions": {"hints": 1}}},
            DataError,
            r"rollout\.agentOptions\.hints.*Did you mean 'hint'",
        ),
        (
            {"actor": {"ppoMiniBatchSize": 2, "optim": {"lrScheduler": "cosine", "lrWarmupSteps": 24}}},
            ConfigError,
            r"24 updates and 24 of warm-up\. Shorten actor\.optim\.lrWarmupSteps",
        ),
    ],
)
async def test_what_cannot_work_is_refused_before_a_member_is_waited_for(
    stage: Stage, agents: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[Exception], words: str
) -> None:  # fmt: skip
    monkeypatch.chdir(agents.parent)
    with pytest.raises(error, match=words):
        await stage.train(stage.job(**changes))


async def test_an_evicted_trainer_loses_no_step(stage: Stage) -> None:
    """The trainer's own words, that one of its processes got SIGTERM, make the coordinator save what the trainer holds."""
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update

        async def evicted_at_the_seventh(request: UpdateRequest) -> Any:
            if request.step == 7:
                stage.trainer.terminating = "trainer-1"
                await asyncio.sleep(0.1)  # some heartbeats
            return update(request)

        stage.trainer.answers[UpdateRequest] = evicted_at_the_seventh
        with pytest.raises(
            YieldedError, match=r"stopped after step 7 of 12 \(trainer-1 is being terminated\)"
        ) as ended:
            await stage.train(stage.job())
        assert isinstance(stage.trainer.calls[-1], StopRequest)
    assert str(ended.value.context["checkpoint"]).endswith("_step_7")
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job())
    assert stage.trainer.steps == [8, 9, 10, 11, 12]
    assert once_an_epoch(stage.trained())


async def test_a_trainer_that_is_evicted_before_the_first_step_ends_the_start(stage: Stage) -> None:
    async with stage.members():  # no engine: the run waits for one
        train = asyncio.create_task(stage.train(stage.job()))
        stage.trainer.terminating = "trainer-0"
        with pytest.raises(YieldedError, match=r"before the first step \(trainer-0 is being terminated\)"):
            await train


async def test_an_engine_that_is_loading_is_told_when_the_run_is_stopped(stage: Stage) -> None:
    async with stage.members():
        loading = Engine("rollout-0")
        beat = msgspec.structs.replace(loading.beat(), state="starting")
        client = HeartbeatClient(stage.url, TOKEN, 0.02, lambda: beat)
        beats = asyncio.create_task(client.run())
        train = asyncio.create_task(stage.train(stage.job()))
        async with asyncio.timeout(30):
            while client.reply is None:
                await asyncio.sleep(0.02)
        async with aiohttp.ClientSession() as session:
            await session.post(f"{stage.url}/v1/stop", headers=authorization(TOKEN))
        with pytest.raises(YieldedError, match="asked over HTTP"):
            await train
        beats.cancel()
    assert client.reply.stop


async def test_status_lists_the_checkpoints_that_are_kept(stage: Stage) -> None:
    seen: list[list[int]] = []
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update

        async def look(request: UpdateRequest) -> Any:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{stage.url}/status", headers=authorization(TOKEN)) as response,
            ):
                status = await response.json()
            seen.append([kept["step"] for kept in status["checkpoints"]])
            return update(request)

        stage.trainer.answers[UpdateRequest] = look
        await stage.train(stage.job(checkpoint={"saveFreq": 2, "keepLast": 2}))
    assert seen[0] == []
    assert seen[-1] in ([10, 8], [8, 6])  # the save of step 10 may still be under way
    assert all(steps == sorted(steps, reverse=True) and len(steps) <= 2 for steps in seen)


async def test_a_run_that_waits_for_its_engines_stops_at_once(stage: Stage) -> None:
    async with stage.members(), aiohttp.ClientSession() as session:  # no engine ever comes
        train = asyncio.create_task(stage.train(stage.job(failurePolicy={"startupTimeoutSeconds": 50.0})))
        async with asyncio.timeout(30):
            while not any(isinstance(call, PublishRequest) for call in stage.trainer.calls):
                await asyncio.sleep(0.02)
        await session.post(f"{stage.url}/v1/stop", headers=authorization(TOKEN))
        async with asyncio.timeout(15):
            with pytest.raises(YieldedError, match="stopped after step 0 of 12"):
                await train


async def test_a_stop_request_breaks_a_validation_off(stage: Stage) -> None:
    async def asks_for_a_stop(engine: Engine, stream: web.StreamResponse, http: web.Request, request: GenerateRequest) -> None:  # fmt: skip
        async with aiohttp.ClientSession() as session:
            await session.post(f"{stage.url}/v1/stop", headers=authorization(TOKEN))
        await engine.released.wait()  # a validation without an end

    job = stage.job(data={"validationFiles": [str(stage.root / "train.parquet")]})
    async with stage.members(Engine("rollout-0", asks_for_a_stop)):
        with pytest.raises(YieldedError, match="stopped after step 0"):
            await stage.train(job)


async def test_prompts_in_place_of_filtered_ones_are_told_once_a_step(stage: Stage) -> None:
    """Ahead of the trainer each filtered group is replaced at once, by itself: no event, and no write, for each."""
    rewards = stage.rewards.with_name("odd_rewards.py")
    rewards.write_text(
        "calls = 0\ndef odd(sample):\n    global calls\n    calls += 1\n    return float(int(sample.ground_truth) % 2 * (calls % 2))\n"
    )
    job = stage.job(
        rollout={"n": 2, "maxStaleness": 1},
        reward={"function": f"{rewards}:odd", "workers": 1},
        algorithm={"filterGroups": {"enable": True, "metric": "score", "maxNumGenBatches": 10}},
        trainer={"totalEpochs": 4, "testFreq": 0, "loggers": ["jsonl"]},
    )
    async with stage.members(Engine("rollout-0")):
        await stage.train(job)
    steps = len(stage.records("metrics.jsonl"))
    filtered = sum(len(record["filtered"]) for record in stage.records("ledger.jsonl"))
    told = [event["message"] for event in stage.records("events.jsonl") if event["reason"] == "Rollout"]
    assert filtered > 2 * steps, "or this shows nothing"
    assert len(told) <= 2 * steps + 2
    assert sum(int(message.split(" prompts x")[0].split()[-1]) for message in told) == PROMPTS * 4
    assert any("in place of filtered and failed ones" in message for message in told)
