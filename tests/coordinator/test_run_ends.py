"""How a whole run ends, and what may have changed when it goes on: nothing that was learned is lost, and no end is a lie."""

import asyncio
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coordinator_helpers import Engine, good
from coordinator_stage import BATCH, PROMPTS, Stage, once_an_epoch

from grpo_worker.coordinator.trainer_client import TrainerFailed, TrainerLost
from grpo_worker.errors import DataError, GRPOError, PeerLostError, StalledError
from grpo_worker.protocol.messages import (
    ErrorReply,
    PublishRequest,
    SaveReply,
    SaveRequest,
    UpdateReply,
    UpdateRequest,
)

pytestmark = pytest.mark.asyncio


def checkpoints(stage: Stage) -> list[int]:
    found = (stage.root / "run" / "checkpoints").glob("epoch_*_step_*")
    return sorted(int(path.name.rpartition("_")[2]) for path in found)


def coordinator_state(stage: Stage, step: int) -> dict[str, Any]:
    (path,) = (stage.root / "run" / "checkpoints").glob(f"epoch_*_step_{step}/coordinator.json")
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def events(stage: Stage, reason: str) -> list[str]:
    return [event["message"] for event in stage.records("events.jsonl") if event["reason"] == reason]


def scoring(stage: Stage, body: str) -> dict[str, Any]:
    """The reward section of a function with this body."""
    file = stage.root / "scoring.py"
    file.write_text(f"import os, pathlib\n\n\ndef score(sample):\n{body}")
    return {"function": f"{file}:score", "workers": 1}


BREAKS = """    if pathlib.Path({flag!r}).exists():
        raise RuntimeError("the judge is down")
    return float(len(sample.response) % 2 + (sample.response[:1] == "1"))
"""


# --- what was learned is saved before the run ends ---


async def fails_after_the_seventh_step(stage: Stage, job: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        await stage.train(job)
    assert checkpoints(stage)[-1] == 7
    assert isinstance(raised.value, GRPOError)
    assert str(raised.value.context["checkpoint"]).endswith("_step_7")
    assert events(stage, raised.value.reason) == [str(raised.value)]
    assert stage.trainer.steps == list(range(1, 8))


@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_judge_that_breaks_costs_no_step(stage: Stage, staleness: int) -> None:
    flag = stage.root / "down"
    reward = scoring(stage, BREAKS.format(flag=str(flag)))
    job = stage.job(reward=reward, rollout={"n": 2, "maxStaleness": staleness})
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update

        def breaks(request: UpdateRequest) -> Any:
            if request.step == 7:
                flag.touch()
            return update(request)

        stage.trainer.answers[UpdateRequest] = breaks
        with pytest.raises(DataError, match=r"(?s)could not be scored.*the judge is down"):
            await stage.train(job)
    last = max(stage.trainer.steps)
    assert last >= 7  # what was scored before is trained on
    assert checkpoints(stage)[-1] == last
    flag.unlink()
    async with stage.members(Engine("rollout-0")):
        await stage.train(job)
    assert stage.trainer.steps == list(range(last + 1, 13))
    assert once_an_epoch(stage.trained())
    assert [line["step"] for line in stage.records("metrics.jsonl")] == list(range(1, 13))


async def test_a_judge_that_is_away_for_a_while_costs_nothing(stage: Stage) -> None:
    """It comes back while the samples wait; the same outage without TryAgain would have failed more than half of a step."""
    flag, tries = stage.root / "down", stage.root / "tries"
    flag.touch()
    tries.touch()
    body = f"""    from grpo_worker.rewards import TryAgain
    if pathlib.Path({str(flag)!r}).exists():
        with open({str(tries)!r}, "a") as file:
            file.write("x")
        raise TryAgain("the judge is restarting")
    return float(len(sample.response) % 2 + (sample.response[:1] == "1"))
"""
    async with stage.members(Engine("rollout-0")):
        training = asyncio.create_task(stage.train(stage.job(reward=scoring(stage, body))))
        async with asyncio.timeout(30):
            while tries.stat().st_size < 8:
                await asyncio.sleep(0.02)
        flag.unlink()
        await training
    assert once_an_epoch(stage.trained())
    (message,) = events(stage, "RewardTryAgain")
    assert message.endswith("the judge is restarting")
    first = stage.records("metrics.jsonl")[0]
    assert first["reward/failures"] == 0
    assert first["reward/tried_again"] >= 8


async def test_a_judge_that_stays_away_ends_the_run_at_the_bound(stage: Stage) -> None:
    body = """    from grpo_worker.rewards import TryAgain
    raise TryAgain("the judge is gone")
"""
    job = stage.job(reward=scoring(stage, body) | {"retrySeconds": 0.2})
    async with stage.members(Engine("rollout-0")):
        with pytest.raises(DataError, match=r"8 of 8 samples .*8 unavailable.*retrySeconds\): the judge is gone"):
            await stage.train(job)


async def test_data_that_changes_meanwhile_changes_nothing_of_a_run_and_no_other_goes_on_with_it(stage: Stage) -> None:
    table = pq.read_table(stage.root / "train.parquet")
    pq.write_table(table.slice(PROMPTS - 1), stage.root / "second.parquet")
    pq.write_table(table.slice(0, PROMPTS - 1), stage.root / "train.parquet")
    files = [str(stage.root / name) for name in ("train.parquet", "second.parquet")]
    job = stage.job(data={"trainFiles": files, "trainBatchSize": BATCH, "maxPromptLength": 16})
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update

        def changes(request: UpdateRequest) -> Any:
            if request.step == 7:
                pq.write_table(pa.table({"prompt": ["1+1="], "reward": ["2"]}), stage.root / "second.parquet")
            return update(request)

        stage.trainer.answers[UpdateRequest] = changes
        await stage.train(job)
    assert once_an_epoch(stage.trained())
    async with stage.members(Engine("rollout-0")):
        with pytest.raises(DataError, match=r"the data is not what the checkpoint was made with: second\.parquet had"):
            await stage.train(job)


async def test_a_prompt_that_never_comes_back_costs_no_step(stage: Stage) -> None:
    async def silent(engine: Engine, stream: Any, http: Any, request: Any) -> None:
        if engine.version < 7:
            await good(engine, stream, http, request)
        else:
            await engine.released.wait()

    async with stage.members(Engine("rollout-0", silent)):
        job = stage.job(failurePolicy={"startupTimeoutSeconds": 20.0, "stallTimeoutSeconds": 1.0})
        await fails_after_the_seventh_step(stage, job, StalledError, "step 8: 4 prompts did not come back")


async def test_engines_that_are_gone_cost_no_step(stage: Stage) -> None:
    """Also the step whose weights no engine serves any more was learned."""
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update

        async def leaves(request: UpdateRequest) -> Any:
            if request.step == 7:
                await stage.leave(stage.engines[0])
            return update(request)

        stage.trainer.answers[UpdateRequest] = leaves
        job = stage.job(failurePolicy={"startupTimeoutSeconds": 2.0})
        await fails_after_the_seventh_step(stage, job, PeerLostError, "0 of 1 rollout servers serve")
    assert [line["step"] for line in stage.records("metrics.jsonl")] == list(range(1, 8))
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job())
    assert stage.trainer.steps == [8, 9, 10, 11, 12]
    assert once_an_epoch(stage.trained())


async def test_a_failure_beside_the_training_lets_the_step_end_and_is_saved(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update that was under way when something beside it failed is part of what is saved."""
    from grpo_worker.coordinator.dispatch import Dispatcher

    failing = asyncio.Event()
    run = Dispatcher.run

    async def fails(self: Dispatcher, *, until_idle: bool = False) -> None:
        task = asyncio.create_task(run(self, until_idle=until_idle))
        waiting = asyncio.create_task(failing.wait())
        try:
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                raise RuntimeError("nobody foresaw this")
        finally:
            for each in (task, waiting):
                each.cancel()
            await asyncio.gather(task, waiting, return_exceptions=True)

    monkeypatch.setattr(Dispatcher, "run", fails)
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update

        async def slow(request: UpdateRequest) -> Any:
            if request.step == 7:
                failing.set()
                await asyncio.sleep(0.3)
            return update(request)

        stage.trainer.answers[UpdateRequest] = slow
        with pytest.raises(RuntimeError, match="nobody foresaw this"):
            await stage.train(stage.job())
    assert checkpoints(stage)[-1] == 7
    assert coordinator_state(stage, 7)["data"]["cursor"] == {"epoch": 1, "position": 7 * BATCH - PROMPTS}


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "failed"])
async def test_a_trainer_that_failed_is_not_asked_to_save(stage: Stage, lost: bool) -> None:
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update
        failure = ErrorReply(reason="DeviceFailed", message="the GPU is gone", exit_code=85, recoverable=False)

        async def until_the_eighth(request: UpdateRequest) -> Any:
            if request.step < 8:
                return update(request)
            while checkpoints(stage) != [5]:
                await asyncio.sleep(0.01)
            return None if lost else failure

        stage.trainer.answers[UpdateRequest] = until_the_eighth
        with pytest.raises(TrainerLost if lost else TrainerFailed):
            await stage.train(stage.job())
    assert checkpoints(stage) == [5]
    assert [call.step for call in stage.trainer.calls if isinstance(call, SaveRequest)] == [5]


@pytest.mark.parametrize("slow", [False, True], ids=["fails", "hangs"])
async def test_a_save_that_fails_leaves_the_first_error_as_the_reason(stage: Stage, slow: bool) -> None:
    flag = stage.root / "down"
    async with stage.members(Engine("rollout-0")):
        update, save = stage.trainer.update, stage.trainer.save

        def breaks(request: UpdateRequest) -> Any:
            if request.step == 7:
                flag.touch()
            return update(request)

        async def full(request: SaveRequest) -> Any:
            if request.step == 5:
                return save(request)
            if slow:
                await asyncio.sleep(60)
            return ErrorReply(reason="CheckpointStorage", message="the disk is full", exit_code=78, recoverable=True)

        stage.trainer.answers |= {UpdateRequest: breaks, SaveRequest: full}
        network = {"heartbeatSeconds": 0.02, "memberTimeoutSeconds": 5.0, "requestTimeoutSeconds": 2.0}
        job = stage.job(reward=scoring(stage, BREAKS.format(flag=str(flag))), network=network)
        with pytest.raises(DataError, match="the judge is down"):
            await stage.train(job)
    assert checkpoints(stage) == [5]
    (message,) = events(stage, "CheckpointFailed")
    assert ("requestTimeoutSeconds" if slow else "the disk is full") in message


async def test_the_last_save_of_a_run_is_not_tried_twice(stage: Stage) -> None:
    async with stage.members(Engine("rollout-0")):
        full = ErrorReply(reason="CheckpointStorage", message="the disk is full", exit_code=78, recoverable=True)
        stage.trainer.answers[SaveRequest] = lambda request: full
        with pytest.raises(GRPOError, match="the disk is full"):
            await stage.train(stage.job(checkpoint={"saveFreq": 0}))
    assert [call.step for call in stage.trainer.calls if isinstance(call, SaveRequest)] == [12]


# --- what may change at a resume ---


async def stopped_after(stage: Stage, step: int, **sections: Any) -> None:
    """A run that was ended by the loss of its engine after so many steps, and saved."""
    limited = {"totalEpochs": 2, "totalSteps": step, "testFreq": 0, "loggers": ["jsonl"]}
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job(**{"trainer": limited, **sections}))
    assert checkpoints(stage)[-1] == step


@pytest.mark.parametrize(("batch_size", "steps", "staleness"), [(2, 20, 0), (8, 8, 0), (8, 8, 2), (12, 6, 0)])
async def test_another_batch_size_at_a_resume_trains_every_prompt_that_is_left(
    stage: Stage, batch_size: int, steps: int, staleness: int
) -> None:
    """48 prompts in two epochs; four steps of four are behind."""
    rollout = {"n": 2, "maxStaleness": staleness}
    await stopped_after(stage, 4, rollout=rollout)
    data = {"trainFiles": [str(stage.root / "train.parquet")], "trainBatchSize": batch_size, "maxPromptLength": 16}
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job(data=data, rollout=rollout))
    updates = [call for call in stage.trainer.calls if isinstance(call, UpdateRequest)]
    assert [call.step for call in updates] == list(range(5, steps + 1))
    assert {call.total_steps for call in updates} == {steps}
    trained = stage.trained()
    assert set(trained.values()) == {1}
    assert len(trained) == 16 + (steps - 4) * batch_size == 48 - (48 - 16) % batch_size
    assert events(stage, "DataEnded") == []
    assert events(stage, "Succeeded")[-1] == f"finished {steps} steps"


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": {"n": 3}},
        {"rollout": {"n": 2, "maxStaleness": 2}},
        {"rollout": {"n": 2, "seed": 7, "temperature": 0.7}},
        {"data": {"maxResponseLength": 64}},
        {"data": {"maxPromptLength": 12}},  # the same prompts are within it
        {"trainer": {"seed": 9}},
        {"trainer": {"gpusPerNode": 2}},
        {"actor": {"ppoMiniBatchSize": 4, "optim": {"lr": 1e-4, "lrScheduler": "cosine", "weightDecay": 0.0}}},
        {"algorithm": {"advantageEstimator": "rloo", "overlongBuffer": {"enable": True}}},
        {"algorithm": {"useKLInReward": True, "klCtrl": {"type": "adaptive", "klCoef": 0.5}}},
        {"model": {"dtype": "bfloat16"}},
        {"reward": {"maxFailureRatio": 0.1}},
    ],
    ids=json.dumps,
)
async def test_what_may_change_at_a_resume(stage: Stage, changes: dict[str, Any]) -> None:
    base: dict[str, Any] = {
        "data": {"trainFiles": [str(stage.root / "train.parquet")], "trainBatchSize": BATCH, "maxPromptLength": 16},
        "trainer": {"totalEpochs": 2, "testFreq": 0, "loggers": ["jsonl"]},
    }
    await stopped_after(stage, 4)
    sections = {name: base.get(name, {}) | section for name, section in changes.items()}
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job(**sections))
    assert stage.trainer.steps[0] == 5
    assert set(stage.trained().values()) == {1}


async def test_the_files_and_the_model_may_move(stage: Stage) -> None:
    await stopped_after(stage, 4)
    elsewhere = stage.root / "elsewhere"
    elsewhere.mkdir()
    for name in ("model", "train.parquet"):
        (stage.root / name).rename(elsewhere / name)
    data = {"trainFiles": [str(elsewhere / "train.parquet")], "trainBatchSize": BATCH, "maxPromptLength": 16}
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job(model={"path": str(elsewhere / "model")}, data=data))
    assert once_an_epoch(stage.trained())


def other_prompts(stage: Stage) -> None:
    table = pq.read_table(stage.root / "train.parquet").to_pydict()
    table["reward"][3] = "1000"
    pq.write_table(pa.table(table), stage.root / "train.parquet")


def other_model(stage: Stage) -> None:
    (stage.root / "model" / "config.json").write_text('{"hidden_size": 4}')


@pytest.mark.parametrize(
    ("changes", "change", "words"),
    [
        ({"data": {"seed": 5}}, None, r"data\.seed was 1 and is 5"),
        ({"data": {"shuffle": False}}, None, r"data\.shuffle was True and is False"),
        ({"data": {"maxPromptLength": 4}}, None, r"24 then and 10 now \(data\.maxPromptLength was 16 and is 4\)"),
        ({}, other_prompts, r"train\.parquet had \d+ bytes and has \d+"),
        ({}, other_model, r"model\.path: the checkpoint's run began with \S+/model, .* differ in config\.json"),
    ],
)
async def test_what_may_not_change_at_a_resume_is_named_with_both_values(
    stage: Stage, changes: dict[str, Any], change: Any, words: str
) -> None:
    await stopped_after(stage, 4)
    data = {"trainFiles": [str(stage.root / "train.parquet")], "trainBatchSize": BATCH, "maxPromptLength": 16}
    if change:
        change(stage)
    async with stage.members(Engine("rollout-0")):
        with pytest.raises(DataError, match=words):
            await stage.train(stage.job(**{name: data | section for name, section in changes.items()}))
        assert stage.trainer.steps == []
    assert checkpoints(stage) == [4]


async def test_more_epochs_go_on_where_the_run_ended(stage: Stage) -> None:
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job(trainer={"totalEpochs": 1, "testFreq": 0, "loggers": ["jsonl"]}))
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job())
    assert stage.trainer.steps == list(range(7, 13))
    assert once_an_epoch(stage.trained())


# --- a run that has learned nothing has failed ---

DYNAMIC = {"filterGroups": {"enable": True, "maxNumGenBatches": 20}}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    return 0.0\n", r"all 96 samples scored 0\. Is the reward function right\? samples\.jsonl shows"),
        ("    return 1.0\n", r"all 96 samples scored 1\. The prompts are too easy"),
        ("    return 0.25\n", r"all 96 samples scored 0\.25\. Does the reward function look at the response\?"),
        ("    return float(len(sample.ground_truth))\n", r"samples scored from 1 to 2, but those of one prompt always"),
    ],
)
@pytest.mark.parametrize("staleness", [0, 2])
async def test_data_without_signal_fails_with_the_scores(stage: Stage, body: str, words: str, staleness: int) -> None:
    """Two epochs are less data than maxNumGenBatches batches, so the data ends first."""
    job = stage.job(
        reward=scoring(stage, body), algorithm=DYNAMIC, rollout={"n": 2, "maxStaleness": staleness, "maxAttempts": 50}
    )
    async with stage.members(Engine("rollout-0")):
        with pytest.raises(DataError, match=words):
            await stage.train(job)
    assert stage.trainer.steps == []
    assert checkpoints(stage) == []
    (record,) = stage.records("ledger.jsonl")
    assert len(record["filtered"]) == 2 * PROMPTS
    assert stage.records("samples.jsonl")


async def test_a_resumed_run_without_signal_keeps_what_it_had(stage: Stage) -> None:
    await stopped_after(stage, 4)
    async with stage.members(Engine("rollout-0")):
        await stage.train(stage.job(reward=scoring(stage, "    return 0.0\n"), algorithm=DYNAMIC))
    assert stage.trainer.steps == []
    assert events(stage, "DataEnded") == ["the data ended after 4 of 12 steps: prompts were filtered or failed"]
    assert events(stage, "Succeeded")[-1] == "finished 4 steps"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    return 0.0\n", r"all 96 samples scored 0\."),
        (
            "    score.calls = getattr(score, 'calls', 0) + 1\n    return float(score.calls % 2)\n",
            r"the scores of 48 groups differed, .*not finite",
        ),
    ],
)
async def test_a_run_whose_updates_were_all_skipped_has_failed(stage: Stage, body: str, words: str) -> None:
    """Without dynamic sampling every step trains, be it on advantages of 0: the trainer skips what has no gradient."""
    async with stage.members(Engine("rollout-0")):
        update = stage.trainer.update

        def skipped(request: UpdateRequest) -> Any:
            update(request)
            return UpdateReply(metrics={"actor/skipped_updates": 2.0 * request.step})

        stage.trainer.answers[UpdateRequest] = skipped
        with pytest.raises(DataError, match=rf"none of the run's 24 updates changed the weights.*{words}"):
            await stage.train(stage.job(reward=scoring(stage, body)))
    assert checkpoints(stage)[-1] == 12  # saved all the same
    assert coordinator_state(stage, 12)["updates"] == 24
    assert not any(isinstance(call, SaveReply) for call in stage.trainer.calls)
    assert any(isinstance(call, PublishRequest) for call in stage.trainer.calls)
