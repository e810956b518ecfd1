"""A prompt that is computed once for its sequences (`actor.sharePrompts`) gives what each of them alone gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_helpers import (
    options_for,
    recorded_update,
    relative_difference,
    save_tiny_model,
    sequences_of,
    single_rank,
)

from grpo_worker.trainer import update
from grpo_worker.trainer.attention import packed_attention
from grpo_worker.trainer.batch import Sequences, collate, neighbours_with_one_prompt
from grpo_worker.trainer.mfu import ModelFlops
from grpo_worker.trainer.model import build_policy
from grpo_worker.trainer.update import compute_log_probs

CPU = torch.device("cpu")
# Three prompts with three, one and four answers, one of a single token.
GROUPS = [(17, (7, 20, 1)), (3, (9,)), (30, (4, 11, 2, 8))]
LENGTHS = [(prompt, response) for prompt, responses in GROUPS for response in responses]


def grouped(seed: int = 0) -> Sequences:
    """Sequences of `GROUPS`: those of a group begin with the same prompt."""
    sequences, first = sequences_of(LENGTHS, seed=seed), 0
    sequences = replace(sequences, token_ids=sequences.token_ids.copy())
    for _, responses in GROUPS:
        prompt = sequences.prompt(first).copy()
        for i in range(first, first + len(responses)):
            sequences.prompt(i)[:] = prompt
        first += len(responses)
    return sequences


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("budget", [40, 70, 1000])
@pytest.mark.parametrize("actor", [{}, {"entropyCoeff": 0.05, "useKLLoss": True, "lossAggMode": "seq-mean-token-mean"}])
def test_log_probs_entropies_and_gradients_are_those_of_each_sequence_alone(
    model: Path, budget: int, actor: dict[str, Any]
) -> None:
    sequences = grouped()
    plain = options_for(model, actor=actor)
    shared = options_for(model, actor=actor | {"sharePrompts": True, "ppoMaxTokenLenPerGPU": budget})
    policy = build_policy(plain, single_rank().mesh)
    expected = compute_log_probs(policy, sequences, plain, single_rank(), plain.spec.rollout)
    found = compute_log_probs(policy, sequences, shared, single_rank(), shared.spec.rollout)
    for ours, wanted in zip(found, expected, strict=True):
        assert np.abs(ours - wanted).max() < 1e-5
    (gradient,), metrics = recorded_update(shared, sequences, single_rank())
    (wanted,), wanted_metrics = recorded_update(plain, sequences, single_rank())
    assert relative_difference(gradient, wanted) < 1e-5
    for name in ("actor/grad_norm", "actor/pg_loss", "actor/entropy"):
        assert metrics[name] == pytest.approx(wanted_metrics[name], rel=1e-5, abs=1e-7), name


def test_a_row_has_each_prompt_once_and_a_response_sees_its_own_prompt_alone() -> None:
    sequences = grouped()
    batch = collate(sequences, range(sequences.count), True, CPU, True)
    assert batch.input_ids.shape[1] == sum(prompt + sum(responses) for prompt, responses in GROUPS)
    assert batch.lengths == tuple(prompt + response for prompt, response in LENGTHS)
    assert batch.segments is not None and batch.segments.key_index is not None
    assert batch.segments.lengths == (17, 7, 20, 1, 3 + 9, 30, 4, 11, 2, 8)
    assert batch.segments.key_lengths == (17, 24, 37, 18, 12, 30, 34, 41, 32, 38)
    keys = batch.segments.key_index.split(batch.segments.key_lengths)
    assert keys[2].tolist() == [*range(17), *range(24, 44)]
    row, positions = batch.input_ids[0], batch.position_ids[0]
    whole = collate(sequences, range(sequences.count), True, CPU)
    for mine, theirs in ((row[keys[2]], 1), (row[keys[8]], 6)):
        start, end = sequences.token_offsets[theirs], sequences.token_offsets[theirs + 1]
        assert mine.tolist() == sequences.token_ids[start:end].tolist()
    assert positions[keys[8]].tolist() == list(range(32))
    assert torch.equal(batch.targets, whole.targets)
    assert torch.equal(row[batch.predict_index], whole.input_ids[0][whole.predict_index])
    assert torch.equal(positions[batch.predict_index], whole.position_ids[0][whole.predict_index])


def test_what_is_shared_is_counted_once_and_no_run_is_over_the_budget() -> None:
    sequences = grouped()
    everyone = range(sequences.count)
    assert neighbours_with_one_prompt(sequences, everyone, 1000) == [[0, 1, 2], [3], [4, 5, 6, 7]]
    assert neighbours_with_one_prompt(sequences, everyone, 44) == [[0, 1], [2], [3], [4], [5, 6], [7]]
    assert neighbours_with_one_prompt(sequences, [0, 2, 4, 7], 1000) == [[0, 2], [4, 7]]


def test_each_micro_batch_is_within_the_budget_with_its_prompts_counted_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def counted(*arguments: Any) -> Any:
        batch = collate(*arguments)
        rows.append(batch.input_ids.shape[1])
        return batch

    monkeypatch.setattr(update, "collate", counted)
    options = options_for(model, actor={"sharePrompts": True, "ppoMaxTokenLenPerGPU": 60})
    recorded_update(options, grouped(), single_rank())
    assert sum(rows) == sum(prompt + sum(responses) for prompt, responses in GROUPS)
    assert max(rows) <= 60


def test_utilization_counts_the_work_of_a_shared_prompt_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "device_peak", lambda *_: 1e9)
    options = options_for(model, actor={"sharePrompts": True})
    flops = ModelFlops.of(build_policy(options, single_rank().mesh).lm)
    assert flops is not None
    _, metrics = recorded_update(options, grouped(), single_rank())
    tokens = sum(prompt + sum(responses) for prompt, responses in GROUPS)
    pairs = sum(
        prompt**2 + sum((prompt + response) ** 2 - prompt**2 for response in responses) for prompt, responses in GROUPS
    )
    needed = 6 * flops.parameters * tokens + 6 * flops.layers * flops.heads * flops.head_size * pairs
    assert metrics["perf/mfu/actor"] == pytest.approx(needed / metrics["timing_s/trainer_update"] / 1e9)


def test_prompts_that_differ_are_not_shared(model: Path) -> None:
    sequences = sequences_of([(5, 7), (5, 9), (5, 4)])
    shared = collate(sequences, range(3), True, CPU, True)
    assert shared.segments is not None and shared.segments.key_index is None
    assert shared.input_ids.shape[1] == 35


def test_attention_of_a_segment_is_that_of_its_whole_sequence() -> None:
    torch.manual_seed(0)
    batch = collate(grouped(), range(8), True, CPU, True)
    assert batch.segments is not None and batch.segments.key_index is not None
    tokens = batch.input_ids.shape[1]
    query, key, value = (torch.randn(1, heads, tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    found, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **batch.segments.arguments())
    first = 0
    for length, keys in zip(
        batch.segments.lengths, batch.segments.key_index.split(batch.segments.key_lengths), strict=True
    ):
        k, v = (tensor[:, :, keys].repeat_interleave(2, dim=1) for tensor in (key, value))
        scores = query[:, :, first : first + length] @ k.transpose(2, 3) / 8**0.5
        seen = torch.arange(len(keys))[None] <= torch.arange(len(keys) - length, len(keys))[:, None]
        wanted = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        assert torch.allclose(found[0, first : first + length], wanted[0].transpose(0, 1), atol=1e-12)
        first += length
