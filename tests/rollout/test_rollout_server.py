"""Each answer of the replica's HTTP interface, from a real engine."""

import asyncio
import threading
import time

import msgspec
import pytest
import torch
from replica_helpers import CONTEXT, VOCABULARY, Replica, Trainer, client, request_of, until, weights
from test_rollout_engine import assert_serves, sync

from grpo_worker.catalogue import entries
from grpo_worker.protocol import codec
from grpo_worker.protocol.messages import Array, ErrorReply, GenerateRequest, GroupResult, PromptRequest


def ask(replica: Replica, request: GenerateRequest) -> tuple[int, ErrorReply]:
    return replica.loop.run(replica.post("/v1/generate", codec.encode(request)))


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (
            [5] * CONTEXT,
            "prompt_too_long",
            f"'bad' has {CONTEXT} tokens; with max_tokens 16 it exceeds the engine's context of {CONTEXT}",
        ),
        ([5] * (CONTEXT - 15), "prompt_too_long", "exceeds"),
        (
            [2, 3, VOCABULARY],
            "token_out_of_range",
            f"token id {VOCABULARY} at position 2 is outside the vocabulary 0..{VOCABULARY - 1}",
        ),
        ([-1], "token_out_of_range", "token id -1 at position 0"),
    ],
)
def test_a_bad_prompt_is_told_by_its_id_and_the_others_are_answered(
    replica: Replica, bad: list[int], kind: str, message: str
) -> None:
    results = replica.generate(request_of({"good": [2, 3], "bad": bad, "better": [5] * (CONTEXT - 16)}))
    assert results["bad"].error_kind == kind
    assert message in (results["bad"].error or "")
    assert not results["bad"].samples
    for name in ("good", "better"):
        assert len(results[name].samples[0].token_ids.numpy()) == 16


def changed(request: GenerateRequest, **sampling: object) -> GenerateRequest:
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **sampling))


GOOD = request_of({"a": [2, 3]})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (request_of({"empty": [], "a": [2]}), "prompt 'empty' has no tokens"),
        (request_of({}), "prompts is empty"),
        (msgspec.structs.replace(GOOD, prompts=GOOD.prompts * 2), "prompt ids occur twice: a"),
        (
            msgspec.structs.replace(GOOD, prompts=[PromptRequest(id="f", token_ids=Array.of([1.0], "float32"))]),
            "'f'.*float32",
        ),
        (
            msgspec.structs.replace(GOOD, prompts=[PromptRequest(id="f", token_ids=Array("int32", b"123"))]),
            "'f'.*3 bytes",
        ),
        (msgspec.structs.replace(GOOD, deadline_seconds=0.0), "deadline_seconds is 0"),
        (changed(GOOD, n=0), "sampling.n is 0"),
        (changed(GOOD, max_tokens=0), "sampling.max_tokens is 0"),
        (changed(GOOD, temperature=-0.5), "sampling.temperature is -0.5"),
        (changed(GOOD, top_p=0.0), "sampling.top_p is 0"),
        (changed(GOOD, top_k=0), "sampling.top_k is 0"),
        (changed(GOOD, min_p=2.0), "sampling.min_p is 2"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_with_the_field(
    replica: Replica, request_: GenerateRequest, message: str
) -> None:
    status, reply = ask(replica, request_)
    assert (status, reply.reason) == (400, "InvalidRequest")
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply.message)


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/weights"])
@pytest.mark.parametrize("body", [b"", b"hello", codec.encode({"request_id": 1})])
def test_a_body_that_is_not_the_message_is_refused(replica: Replica, path: str, body: bytes) -> None:
    status, reply = replica.loop.run(replica.post(path, body))
    assert (status, reply.reason) == (400, "InvalidRequest")
    assert "the body is not a" in reply.message


def test_a_body_over_the_limit_is_refused(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    status, reply = replica.loop.run(replica.post("/v1/generate", bytes((256 << 20) + 1)))
    assert (status, reply.reason) == (413, "RequestTooLarge")


def test_the_token_guards_all_but_probes_and_metrics(replica: Replica) -> None:
    for path in ("/v1/generate", "/v1/weights"):
        assert replica.loop.run(replica.post(path, codec.encode(GOOD), token="wrong"))[0] == 401
    assert replica.get("/healthz") == (200, "ok\n")
    assert replica.get("/readyz") == (200, "ready\n")
    assert replica.get("/nothing")[0] in (401, 404)


def test_an_older_version_than_needed_is_refused(replica: Replica, trainer: Trainer) -> None:
    sync(replica, trainer, 50, 51)
    status, reply = ask(replica, request_of({"a": [2]}, min_weight_version=51))
    assert (status, reply.reason) == (409, "StaleWeights")
    assert "serves weight version 50, the request needs 51" in reply.message
    assert replica.generate(request_of({"a": [2]}, min_weight_version=50))["a"].error is None


def test_a_deadline_answers_for_every_prompt_and_frees_the_engine(replica: Replica) -> None:
    prompts = {f"p{i}": [2, i + 2] for i in range(60)}
    started = time.monotonic()
    results = replica.generate(request_of(prompts, n=4, temperature=1.0, max_tokens=200, deadline_seconds=0.3))
    assert time.monotonic() - started < 10
    assert results.keys() == prompts.keys()
    late = [result for result in results.values() if result.error_kind == "deadline"]
    assert late
    assert "was not finished within 0.3 s" in (late[0].error or "")
    replica.loop.run(idle(replica))


async def idle(replica: Replica) -> None:
    """Wait until nothing runs or waits in the engine."""
    engine = replica.engine
    await until(lambda: not (engine._llm.has_unfinished_requests() or engine._requests), "it is idle")


def test_a_client_that_goes_away_takes_its_requests_out_of_the_engine(replica: Replica) -> None:
    request = request_of({f"p{i}": [2, i + 2] for i in range(32)}, n=2, temperature=1.0, max_tokens=240)

    async def leave() -> None:
        async with client() as session, session.post(f"{replica.url}/v1/generate", data=codec.encode(request)):
            await until(lambda: len(replica.engine._requests) >= 64, "all 64 samples are admitted")
        await idle(replica)

    replica.loop.run(leave())


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("atomic", [False, True])
def test_a_client_that_goes_away_while_its_prompts_are_admitted_leaves_an_idle_engine(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, atomic: bool, begun: bool
) -> None:
    """It leaves before its prompts have their turn, or after the first of them is in."""
    llm = replica.engine._llm
    whole, entered, gone = llm.add_request, threading.Event(), threading.Event()

    def slow(*arguments: object, **keywords: object) -> object:
        added = whole(*arguments, **keywords)
        entered.set()
        assert gone.wait(20)
        return added

    async def leave() -> None:
        if begun:
            monkeypatch.setattr(llm, "add_request", slow)
        else:
            replica.engine._thread.submit(lambda: (entered.set(), gone.wait(20)))
        request = request_of({f"p{i}": [2, i + 2] for i in range(4)}, max_tokens=240, atomic=atomic)
        asking = asyncio.create_task(replica.generate_async(request, {}))
        await asyncio.to_thread(entered.wait, 20)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(0.5)  # the server has seen it go
        gone.set()
        await idle(replica)
        monkeypatch.undo()

    replica.loop.run(leave())
    answered = replica.generate(request_of({"a": [2, 3]}, deadline_seconds=10.0))
    assert answered["a"].error is None


def test_requests_that_meet_a_sync_wait_for_it_within_their_deadline(replica: Replica, trainer: Trainer) -> None:
    sync(replica, trainer, 52, 52)

    async def while_swapping() -> tuple[dict[str, GroupResult], dict[str, GroupResult]]:
        patient: dict[str, GroupResult] = {}
        hasty: dict[str, GroupResult] = {}
        swapped = threading.Event()
        replica.engine._thread.submit(swapped.wait, 60)  # as a swap does, it holds the engine's thread
        waiting = asyncio.create_task(replica.generate_async(request_of({"a": [2]}, request_id="patient"), patient))
        await replica.generate_async(request_of({"b": [2]}, deadline_seconds=0.2, request_id="hasty"), hasty)
        assert not waiting.done()
        swapped.set()
        await waiting
        return patient, hasty

    patient, hasty = replica.loop.run(while_swapping())
    assert patient["a"].error is None
    assert hasty["b"].error_kind == "deadline"


def test_a_sync_that_outlives_its_request_is_done_before_the_next_one_pulls(replica: Replica, trainer: Trainer) -> None:
    """The staging memory that it reads is not written meanwhile."""
    sync(replica, trainer, 54, 54)

    async def late_and_next() -> ErrorReply | None:
        swap, held = replica.engine._swap, threading.Event()

        def slow(*arguments: object) -> float:
            assert held.wait(20)
            return swap(*arguments)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replica.engine, "_swap", slow)
            status, late = await asyncio.to_thread(replica.apply, trainer.publish(55, weights(55)), 1.0)
            assert (status, late.reason) == (504, "Stalled")
        following = asyncio.create_task(asyncio.to_thread(replica.apply, trainer.publish(56, weights(56))))
        await asyncio.sleep(0.5)
        assert (replica.engine.weight_version, following.done()) == (54, False)
        held.set()
        status, _ = await following
        assert status == 200

    replica.loop.run(late_and_next())
    assert_serves(replica, 56, 56)


def test_metrics_are_vllms_and_ours_in_one_page(replica: Replica, trainer: Trainer) -> None:
    sync(replica, trainer, 53, 53)
    replica.generate(request_of({"a": [2], "bad": [VOCABULARY]}))
    status, text = replica.get("/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    assert float(values["grpo_rollout_weight_version"]) == 53
    assert float(values["grpo_rollout_requests_total"]) >= 1
    assert float(values["grpo_rollout_generated_tokens_total"]) >= 16
    assert float(values['grpo_rollout_errors_total{kind="token_out_of_range"}']) >= 1
    assert float(values["grpo_rollout_weight_sync_bytes_total"]) > 0
    assert float(values['grpo_rollout_weight_sync_seconds_count{part="pause"}']) >= 1
    exposed = {name.partition("{")[0] for name in values}
    ours = {name for name, entry in entries("rollout").items() if entry.kind != "histogram"}
    assert (ours | set(entries("vllm"))) - exposed == {"grpo_rollout_weight_sync_failures_total"} - exposed
    assert float(values["grpo_rollout_busy_seconds_total"]) > 0


@pytest.mark.kills_the_engine
def test_a_dead_engine_is_told_to_all_who_wait_and_all_who_come(replica: Replica, trainer: Trainer) -> None:
    long = request_of({f"p{i}": [2, i + 2] for i in range(32)}, n=2, temperature=1.0, max_tokens=240)
    source = trainer.publish(60, weights(60))

    def break_down(model: torch.nn.Module) -> None:
        def forward(*_: object, **__: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

        model.forward = forward  # type: ignore[method-assign]

    async def kill_while_running() -> dict[str, GroupResult]:
        results: dict[str, GroupResult] = {}
        generation = asyncio.create_task(replica.generate_async(long, results))
        await until(lambda: replica.engine.stats()["running"] >= 1, "1 sequences run")
        await replica.engine._thread.between_steps(replica.engine._llm.apply_model, break_down)
        async with asyncio.timeout(30):
            await generation
        return results

    results = replica.loop.run(kill_while_running())
    assert results.keys() == {prompt.id for prompt in long.prompts}
    assert {result.error_kind for result in results.values()} == {"engine_dead"}
    assert all("illegal memory access" in str(result.error) for result in results.values())
    status, reply = ask(replica, GOOD)
    assert (status, reply.reason) == (503, "EngineDead")
    status, failed = replica.apply(source)
    assert isinstance(failed, ErrorReply)
    assert (status, failed.reason) == (503, "EngineDead")
    assert replica.get("/healthz") == (503, "the engine is dead\n")
