"""Against a real vLLM engine: what it samples is what the trainer's model says, before and after each weight sync."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from replica_helpers import CONTEXT, Replica, Trainer, engine_options, request_of, tiny_model, until, weights

from grpo_worker.protocol.messages import ApplyWeightsReply, Array, GenerateRequest, GroupResult, VersionSpan
from grpo_worker.rollout.engine import RolloutEngine
from grpo_worker.rollout.generation import generate as stream

PROMPTS = {"a": [2, 3, 4], "b": [9, 8, 7, 6, 5], "c": [40] * 40}


@torch.no_grad()
def hf_log_probs(seed: int, tokens: list[int], prompt_tokens: int, temperature: float = 1.0) -> np.ndarray:
    """Log-probs of the response tokens by the Hugging Face model in fp32, [response tokens]."""
    logits = tiny_model(seed)(torch.tensor([tokens])).logits[0, prompt_tokens - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[prompt_tokens:])[:, None])[:, 0].numpy()


@torch.no_grad()
def hf_greedy(seed: int, prompt: list[int], count: int) -> list[int]:
    model, tokens = tiny_model(seed), list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def assert_serves(replica: Replica, seed: int, version: int) -> None:
    """The engine's greedy tokens and log-probs are those of the model made from `seed`."""
    results = replica.generate(request_of(PROMPTS))
    for name, prompt in PROMPTS.items():
        (sample,) = results[name].samples
        tokens = sample.token_ids.numpy().tolist()
        assert tokens == hf_greedy(seed, prompt, 16)
        np.testing.assert_allclose(
            sample.log_probs.numpy(), hf_log_probs(seed, prompt + tokens, len(prompt)), atol=1e-4
        )
        assert sample.versions == [VersionSpan(version, 0, 16)]


def sync(replica: Replica, trainer: Trainer, version: int, seed: int) -> ApplyWeightsReply:
    status, reply = replica.apply(trainer.publish(version, weights(seed)))
    assert status == 200, reply
    assert isinstance(reply, ApplyWeightsReply)
    return reply


def test_each_sync_makes_the_engine_the_model_that_was_published(replica: Replica, trainer: Trainer) -> None:
    for version, seed in ((1, 11), (2, 12), (3, 11)):
        source = trainer.publish(version, weights(seed))
        status, reply = replica.apply(source)
        assert status == 200, reply
        assert isinstance(reply, ApplyWeightsReply)
        assert (reply.version, reply.digest, reply.bytes) == (version, source.digest, source.total_bytes)
        assert reply.pause_seconds <= reply.total_seconds
        assert_serves(replica, seed, version)


def test_log_probs_are_those_of_the_tempered_distribution(model_directory: Path) -> None:
    """An engine of a run with `rollout.temperature: 0.7`."""

    async def generate() -> list[GroupResult]:
        engine = RolloutEngine(engine_options(str(model_directory), CONTEXT, temperature=0.7))
        await engine.start()
        try:
            request = request_of(PROMPTS, n=3, temperature=0.7, max_tokens=24)
            return [result async for result in stream(engine, request) if isinstance(result, GroupResult)]
        finally:
            engine.shutdown()

    results = asyncio.run(generate())
    assert {result.id for result in results} == PROMPTS.keys()
    for result in results:
        for sample in result.samples:
            prompt = PROMPTS[result.id]
            tokens = prompt + sample.token_ids.numpy().tolist()
            np.testing.assert_allclose(sample.log_probs.numpy(), hf_log_probs(0, tokens, len(prompt), 0.7), atol=1e-4)


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 5}], ids=str)
def test_a_cut_is_in_what_is_sampled_and_not_in_the_log_probs(
    replica: Replica, trainer: Trainer, cut: dict[str, float]
) -> None:
    """The trainer's log-probs are of the whole vocabulary: with the mass of what survives in it, a long answer's weight would be 0."""
    sync(replica, trainer, 4, 13)
    results = replica.generate(request_of(PROMPTS, n=3, temperature=1.0, max_tokens=24, **cut))
    for name, prompt in PROMPTS.items():
        for sample in results[name].samples:
            tokens = prompt + sample.token_ids.numpy().tolist()
            np.testing.assert_allclose(sample.log_probs.numpy(), hf_log_probs(13, tokens, len(prompt)), atol=1e-4)
            logits = tiny_model(13)(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].detach()
            sampled = logits.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])
            above = torch.where(logits > sampled, logits.softmax(-1), 0.0)
            if "top_k" in cut:
                assert int((above > 0).sum(-1).max()) < 5
            else:
                assert float(above.sum(-1).max()) < 0.8 + 1e-4


def test_a_cached_prefix_is_not_used_with_new_weights(replica: Replica, trainer: Trainer) -> None:
    prompt = {"long": list(np.arange(128) % 60 + 2)}
    sync(replica, trainer, 5, 14)
    for _ in range(2):
        replica.generate(request_of(prompt))
    sync(replica, trainer, 6, 15)
    (sample,) = replica.generate(request_of(prompt))["long"].samples
    tokens = prompt["long"] + sample.token_ids.numpy().tolist()
    np.testing.assert_allclose(sample.log_probs.numpy(), hf_log_probs(15, tokens, 128), atol=1e-4)


def bits(results: dict[str, GroupResult]) -> dict[str, list[tuple[bytes, bytes]]]:
    return {
        name: [(sample.token_ids.data, sample.log_probs.data) for sample in result.samples]
        for name, result in results.items()
    }


def test_an_atomic_request_gives_the_same_bits_whatever_came_before_and_beside_it(
    replica: Replica, trainer: Trainer
) -> None:
    sync(replica, trainer, 7, 16)
    prompts = {f"p{i}": [2 + i % 60, 3, 4 + i % 7] * (1 + i % 5) for i in range(12)}
    atomic = request_of(prompts, n=4, temperature=1.0, max_tokens=40, ignore_eos=False, atomic=True)
    alone = bits(replica.generate(atomic))
    replica.generate(request_of({"warm": prompts["p0"] * 12}, n=3, temperature=1.0))

    async def beside(first: GenerateRequest, second: GenerateRequest) -> list[dict[str, GroupResult]]:
        results: list[dict[str, GroupResult]] = [{}, {}]
        await asyncio.gather(replica.generate_async(first, results[0]), replica.generate_async(second, results[1]))
        return results

    other = request_of({"other": [5, 6]}, n=8, temperature=1.0, max_tokens=60, request_id="other")
    assert bits(replica.loop.run(beside(other, atomic))[1]) == alone
    assert bits(replica.loop.run(beside(atomic, other))[0]) == alone
    assert len({sample for group in alone.values() for sample in group}) > 12


def test_a_sample_depends_on_its_seed_and_index_and_not_on_its_batch(replica: Replica, trainer: Trainer) -> None:
    sync(replica, trainer, 8, 17)
    many = replica.generate(request_of({f"p{i}": [7, 8, 9] for i in range(6)}, n=4, temperature=1.0, seed=100))
    alone = replica.generate(request_of({"x": [7, 8, 9]}, n=2, temperature=1.0, seed=103))
    tokens = [sample.token_ids.numpy().tolist() for sample in many["p3"].samples]
    assert [sample.token_ids.numpy().tolist() for sample in alone["x"].samples] == tokens[:2]
    everything = {tuple(sample.token_ids.numpy().tolist()) for group in many.values() for sample in group.samples}
    assert len(everything) == 24


def test_log_probs_come_where_they_were_asked_for_and_change_no_token(replica: Replica, trainer: Trainer) -> None:
    sync(replica, trainer, 9, 17)
    prompts = {f"p{i}": [7, 8, 9] for i in range(4)}
    request = request_of(prompts, n=3, temperature=1.0, seed=100, ignore_eos=False)
    all_of_them = replica.generate(request)
    asked = [msgspec.structs.replace(one, log_probs=one.id in ("p0", "p2")) for one in request.prompts]
    some = replica.generate(msgspec.structs.replace(request, prompts=asked))
    for name, group in all_of_them.items():
        for sample, other in zip(group.samples, some[name].samples, strict=True):
            assert other.token_ids == sample.token_ids
            assert other.log_probs == (sample.log_probs if name in ("p0", "p2") else Array.of([], "float32"))


def test_the_end_of_text_token_ends_a_sample_and_stays_in_it(replica: Replica) -> None:
    prompts = {f"p{i}": [i + 2, 5] for i in range(40)}
    samples = [
        g.samples[0]
        for g in replica.generate(request_of(prompts, temperature=2.0, max_tokens=100, ignore_eos=False)).values()
    ]
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert stopped
    for sample in stopped:
        tokens = sample.token_ids.numpy().tolist()
        assert tokens.index(1) == len(tokens) - 1 == len(sample.log_probs.numpy()) - 1
    stop = request_of(prompts, temperature=2.0, max_tokens=100, stop_token_ids=[9, 10])
    for group in replica.generate(stop).values():
        tokens = group.samples[0].token_ids.numpy().tolist()
        assert (group.samples[0].finish_reason == "stop") == (tokens[-1] in (9, 10))
        assert not {9, 10} & set(tokens[:-1])


def test_a_swap_under_running_requests_splits_their_spans_where_the_weights_changed(
    replica: Replica, trainer: Trainer
) -> None:
    sync(replica, trainer, 20, 18)
    source = trainer.publish(21, weights(19))
    long = request_of({f"p{i}": [3, 4, i + 2] for i in range(4)}, n=2, temperature=1.0, max_tokens=240)

    async def swap_while_running() -> dict[str, GroupResult]:
        results: dict[str, GroupResult] = {}
        generation = asyncio.create_task(replica.generate_async(long, results))
        await until(lambda: generation.done() or replica.engine.stats()["running"] >= 8, "8 sequences run")
        assert not generation.done()
        status, _ = await asyncio.to_thread(replica.apply, source)
        assert status == 200
        await generation
        return results

    results = replica.loop.run(swap_while_running())
    spans = [sample.versions for group in results.values() for sample in group.samples]
    assert len(spans) == 8
    for versions in spans:
        assert [span.version for span in versions] == [20, 21]
        assert (versions[0].start, versions[0].end, versions[1].end) == (0, versions[1].start, 240)
    for name, group in results.items():
        prompt = [3, 4, int(name[1:]) + 2]
        for sample in group.samples:
            tokens, cut = prompt + sample.token_ids.numpy().tolist(), sample.versions[0].end
            got = sample.log_probs.numpy()
            np.testing.assert_allclose(got[:cut], hf_log_probs(18, tokens, 3)[:cut], atol=1e-4)
            np.testing.assert_allclose(got[cut:], hf_log_probs(19, tokens, 3)[cut:], atol=1e-4)


@pytest.mark.parametrize("clear_cache", [True, False])
def test_running_requests_go_on_over_a_swap_with_what_they_have_when_caches_are_kept(
    replica: Replica, trainer: Trainer, clear_cache: bool
) -> None:
    """8 requests run when the weights are swapped: cleared caches preempt each of them, kept ones none. Whatever was kept, a request that
    comes afterwards sees nothing of the old weights, though its prompt is that of a running one."""
    base = 60 + 10 * clear_cache
    sync(replica, trainer, base, 18)
    source = trainer.publish(base + 1, weights(19))
    prompts = {f"p{i}": [3, 4, i + 2] * 32 for i in range(4)}
    long = request_of(prompts, n=2, temperature=1.0, max_tokens=150)
    before = replica.engine.stats()["preemptions_total"]

    async def swap_while_running() -> dict[str, GroupResult]:
        results: dict[str, GroupResult] = {}
        generation = asyncio.create_task(replica.generate_async(long, results))
        await until(lambda: generation.done() or replica.engine.stats()["running"] >= 8, "8 sequences run")
        assert not generation.done()
        status, _ = await asyncio.to_thread(replica.apply, source, clear_cache=clear_cache)
        assert status == 200
        await generation
        return results

    results = replica.loop.run(swap_while_running())
    assert replica.engine.stats()["preemptions_total"] - before == (8 if clear_cache else 0)
    for name, group in results.items():
        for sample in group.samples:
            assert [span.version for span in sample.versions] == [base, base + 1]
            tokens, cut = prompts[name] + sample.token_ids.numpy().tolist(), sample.versions[0].end
            got = sample.log_probs.numpy()
            np.testing.assert_allclose(got[:cut], hf_log_probs(18, tokens, 96)[:cut], atol=1e-4)
            after = np.abs(got[cut:] - hf_log_probs(19, tokens, 96)[cut:]).max()
            assert (after < 1e-4) == clear_cache, "the new weights read what the old ones wrote"
    for name, group in replica.generate(request_of(prompts)).items():
        (sample,) = group.samples
        tokens = prompts[name] + sample.token_ids.numpy().tolist()
        np.testing.assert_allclose(sample.log_probs.numpy(), hf_log_probs(19, tokens, 96), atol=1e-4)


@pytest.mark.parametrize("n", [1, 64])
def test_groups_are_complete(replica: Replica, n: int) -> None:
    (group,) = replica.generate(request_of({"a": [2, 3]}, n=n, temperature=1.0, max_tokens=4)).values()
    assert len(group.samples) == n
