"""Gradients and updates on one rank: against plain Transformers, and against each other however the batch is cut."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from trainer_helpers import (
    options_for,
    recorded_update,
    relative_difference,
    save_tiny_model,
    sequences_of,
    single_rank,
    whole_parameters,
    without_old_log_probs,
)
from transformers import AutoModelForCausalLM

from grpo_worker.algorithms.correction import corrected
from grpo_worker.errors import DataError
from grpo_worker.trainer import update
from grpo_worker.trainer.batch import Sequences, collate
from grpo_worker.trainer.model import build_policy
from grpo_worker.trainer.optimizer import PolicyOptimizer
from grpo_worker.trainer.options import TrainerOptions
from grpo_worker.trainer.update import TrainerState, Updater, compute_log_probs
from grpo_worker.trainer.user_loss import policy_loss

LENGTHS = [(5, 7), (3, 20), (10, 4), (6, 6), (2, 1), (4, 11), (8, 3), (1, 9)]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def updater_for(options: TrainerOptions) -> Updater:
    actor, ranks = options.spec.actor, single_rank()
    policy = build_policy(options, ranks.mesh, param_offload=actor.fsdp.param_offload)
    optimizer = PolicyOptimizer(policy, actor.optim, ranks, actor.fsdp.optimizer_offload)
    return Updater(policy, optimizer, options, ranks, policy_loss(actor.loss_mode), TrainerState())


def plain_gradient(model: Path, sequences: Sequences, mode: str, kl_coef: float) -> dict[str, torch.Tensor]:
    """PPO clip 0.2/0.2 without the dual bound, k3 KL, by autograd through Transformers' own logits."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = sequences.response_mask.sum()
    per_sequence = []
    for i in range(sequences.count):
        span = slice(sequences.response_offsets[i], sequences.response_offsets[i + 1])
        ids = torch.from_numpy(
            sequences.token_ids[sequences.token_offsets[i] : sequences.token_offsets[i + 1]].astype(np.int64)
        )
        prompt = int(sequences.prompt_lengths[i])
        rows = torch.log_softmax(lm(ids[None]).logits[0], -1)[prompt - 1 : -1]
        log_probs = rows.gather(-1, ids[prompt:, None]).squeeze(-1)
        old, ref, advantage, weight = (
            torch.from_numpy(sequences.values[name][span])
            for name in ("old_log_probs", "ref_log_probs", "advantages", "is_weights")
        )
        ratio = (log_probs - old).exp()
        policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)) * weight
        kl = (ref - log_probs).exp() - (ref - log_probs) - 1
        mask = torch.from_numpy(sequences.response_mask[span])
        per_sequence.append(((policy + kl_coef * kl) * mask, mask))
    valid = [(loss, mask) for loss, mask in per_sequence if mask.sum() > 0]
    total = torch.stack([loss.sum() for loss, _ in valid]).sum()
    loss = {
        "token-mean": total / tokens,
        "token-sum": total,
        "seq-mean-token-sum": total / len(valid),
        "seq-mean-token-sum-norm": total / (len(valid) * 64),
        "seq-mean-token-mean": torch.stack([loss.sum() / mask.sum() for loss, mask in valid]).mean(),
    }[mode]
    loss.backward()
    return {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_do_not_change_the_gradient(model: Path, mode: str) -> None:
    sequences = sequences_of(LENGTHS)
    loss = {"lossAggMode": mode, "useKLLoss": True, "klLossCoef": 0.1, "clipRatioC": 1e6}
    cuts: list[dict[str, Any]] = [
        {"actor": loss | {"ppoMicroBatchSizePerGPU": 8}},
        {"actor": loss | {"ppoMicroBatchSizePerGPU": 1}},
        {"actor": loss | {"ppoMaxTokenLenPerGPU": 30}},
        {"actor": loss | {"ppoMicroBatchSizePerGPU": 3}, "model": {"useRemovePadding": False}},
    ]
    gradients = [recorded_update(options_for(model, **cut), sequences, single_rank())[0][0] for cut in cuts]
    for other in gradients[1:]:
        assert relative_difference(other, gradients[0]) < 1e-6
    assert relative_difference(gradients[0], plain_gradient(model, sequences, mode, 0.1)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_that_wait_for_the_last_micro_batch_are_those_reduced_after_each(model: Path, dtype: str) -> None:
    found = []
    for when in ("auto", "microBatch", "update"):
        actor = {"ppoMicroBatchSizePerGPU": 2, "fsdp": {"gradientReduction": when}}
        options = options_for(model, actor=actor, model={"dtype": dtype})
        found.append(recorded_update(options, sequences_of(LENGTHS, mini_batches=[4, 4]), single_rank())[0])
    for other in found[1:]:
        for after, wanted in zip(other, found[0], strict=True):
            assert relative_difference(after, wanted) == 0.0


def test_between_micro_batches_the_gathered_weights_stay_and_after_the_last_they_go(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updater = updater_for(options_for(model, actor={"ppoMicroBatchSizePerGPU": 2}))
    held: list[bool] = []
    compute = Updater._forward_backward

    def watched(self: Updater, *arguments: Any) -> None:
        compute(self, *arguments)
        held.append(all(not isinstance(p, DTensor) for layer in self.model.layers for p in layer.parameters()))

    monkeypatch.setattr(Updater, "_forward_backward", watched)
    updater.update(sequences_of(LENGTHS, mini_batches=[4, 4]), step=1)
    assert held == [True, False, True, False]


@pytest.mark.parametrize("mode", MODES)
def test_values_at_masked_tokens_change_neither_gradient_nor_metrics(model: Path, mode: str) -> None:
    sequences = sequences_of(LENGTHS)
    observed = sequences.response_mask == 0
    assert observed.any()
    extremes = {"old_log_probs": 0.0, "ref_log_probs": -80.0, "advantages": 1e6, "is_weights": 1e6}
    values = {name: np.where(observed, extremes[name], given).astype(np.float32) for name, given in sequences.values.items()}  # fmt: skip
    loss = {"lossAggMode": mode, "useKLLoss": True, "klLossCoef": 0.1, "entropyCoeff": 0.01}
    options = options_for(model, actor=loss)
    (gradient,), metrics = recorded_update(options, sequences, single_rank())
    (other,), other_metrics = recorded_update(options, replace(sequences, values=values), single_rank())
    assert relative_difference(other, gradient) == 0.0
    for name in ("pg_loss", "pg_clipfrac", "ppo_kl", "kl_loss", "entropy", "grad_norm"):
        assert other_metrics[f"actor/{name}"] == metrics[f"actor/{name}"], name


def test_metrics_do_not_depend_on_micro_batches(model: Path) -> None:
    sequences = sequences_of(LENGTHS, mini_batches=[4, 4])
    loss = {"useKLLoss": True, "entropyCoeff": 0.01}
    one, many = (
        recorded_update(options_for(model, actor=loss | {"ppoMicroBatchSizePerGPU": size}), sequences, single_rank())[1]
        for size in (8, 1)
    )
    for name in ("pg_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "kl_loss", "entropy", "grad_norm", "lr"):
        assert one[f"actor/{name}"] == pytest.approx(many[f"actor/{name}"], rel=1e-4), name


CORRECTIONS: list[dict[str, Any]] = [
    {},
    {"rolloutIs": "none"},
    {"rolloutIs": "sequence", "rolloutIsThreshold": 1.5},
    {"rolloutIs": "token", "rolloutIsThreshold": 1.3, "rolloutIsLowerThreshold": 0.6},
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo", "cispo"])
def test_one_update_needs_no_pass_before_it(model: Path, loss_mode: str, correction: dict[str, Any]) -> None:
    """The twin: old log-probs by a pass of its own, the weights made of them as the coordinator makes them."""
    options = options_for(
        model,
        actor={"lossMode": loss_mode, "ppoMaxTokenLenPerGPU": 40, "optim": {"lr": 1e-3}},
        algorithm={"rolloutCorrection": correction},
    )
    given = sequences_of(LENGTHS)
    old, _ = compute_log_probs(
        build_policy(options, single_rank().mesh), given, options, single_rank(), options.spec.rollout
    )
    rollout = (old + np.random.default_rng(3).normal(0, 0.3, len(old))).astype(np.float32)
    seq_ids = torch.from_numpy(np.repeat(np.arange(given.count), given.response_lengths))
    expected = corrected(
        torch.from_numpy(old), torch.from_numpy(rollout), torch.from_numpy(given.response_mask), seq_ids, given.count,
        options.spec.algorithm.rollout_correction,
    )  # fmt: skip
    advantages = {"advantages": given.values["advantages"]}
    before = replace(given, values=advantages | {"old_log_probs": old, "is_weights": expected.weights.numpy()})
    inside = replace(given, values=advantages | {"rollout_log_probs": rollout})
    (gradient,), metrics = recorded_update(options, before, single_rank())
    (other,), other_metrics = recorded_update(options, inside, single_rank())
    assert relative_difference(other, gradient) < 1e-5
    for name, value in (metrics | expected.metrics).items():
        if name.startswith(("actor/", "clip_ratio/", "rollout_corr/", "training/")):
            assert other_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert expected.metrics
    assert other_metrics["actor/ppo_kl"] == 0.0


def test_log_probs_that_did_not_come_from_the_engine_are_not_missed(model: Path) -> None:
    options = options_for(model, algorithm={"rolloutCorrection": {"rolloutIs": "none"}})
    whole = without_old_log_probs(sequences_of(LENGTHS))
    some = whole.values["rollout_log_probs"].copy()
    some[7:] = np.nan  # all but those of the first sequence
    (gradient,), _ = recorded_update(options, whole, single_rank())
    values = whole.values | {"rollout_log_probs": some}
    (other,), metrics = recorded_update(options, replace(whole, values=values), single_rank())
    assert all(torch.equal(other[name], gradient[name]) for name in gradient)
    assert metrics["training/rollout_log_probs_sequences"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("document", "mini_batches"),
    [
        ({}, [4, 4]),
        ({"actor": {"ppoEpochs": 2}}, []),
        ({"algorithm": {"rolloutCorrection": {"rolloutRs": ["token_k1"]}}}, []),
        ({"algorithm": {"rolloutCorrection": {"rolloutIsBatchNormalize": True}}}, []),
    ],
    ids=str,
)
def test_an_update_that_cannot_make_old_log_probs_asks_for_them(
    model: Path, document: dict[str, Any], mini_batches: list[int]
) -> None:
    sequences = without_old_log_probs(sequences_of(LENGTHS, mini_batches=mini_batches))
    with pytest.raises(DataError, match="the batch has no old_log_probs"):
        updater_for(options_for(model, **document)).check(sequences)
    neither = replace(sequences, values={"advantages": sequences.values["advantages"]})
    with pytest.raises(DataError, match="the batch has no old_log_probs"):
        updater_for(options_for(model)).check(neither)


@pytest.mark.parametrize(
    "change",
    [
        {"enableGradientCheckpointing": False},
        {"gradientCheckpointing": "selective"},
        {"headChunkSize": 5},
        {"compile": False},
    ],
)
def test_memory_savers_do_not_change_the_gradient(model: Path, change: dict[str, Any]) -> None:
    sequences = sequences_of(LENGTHS)
    loss = {"entropyCoeff": 0.05}
    usual = recorded_update(options_for(model, actor=loss), sequences, single_rank())[0][0]
    changed = recorded_update(options_for(model, actor=loss, model=change), sequences, single_rank())[0][0]
    assert relative_difference(changed, usual) < 1e-6


@pytest.mark.parametrize("change", [{}, {"entropyCoeff": 0.05}, {"fsdp": {"paramOffload": True}}])
def test_what_is_run_before_the_first_update_leaves_nothing_behind(model: Path, change: dict[str, Any]) -> None:
    options = options_for(model, actor=change)
    plain, warm = updater_for(options), updater_for(options)
    before = whole_parameters(warm.model)
    warm.warm_up()
    assert all(parameter.grad is None for parameter in warm.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in whole_parameters(warm.model).items())
    for updater in (plain, warm):
        updater.update(sequences_of(LENGTHS), step=1)
    expected = whole_parameters(plain.model)
    assert all(torch.equal(value, expected[name]) for name, value in whole_parameters(warm.model).items())
    assert warm.state == plain.state


def test_full_recomputation_repeats_the_layers_and_selective_no_matrix_product(model: Path) -> None:
    def operations(**section: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            recorded_update(options_for(model, model=section), sequences_of(LENGTHS), single_rank())
        return int(counter.get_total_flops())

    once = operations(enableGradientCheckpointing=False)
    assert operations(gradientCheckpointing="selective") == once
    # A multiplication and an addition for each weight and token. Nothing in the backward pass needs what a layer's last product gives.
    layers = AutoModelForCausalLM.from_pretrained(model).model.layers
    weights = [p.numel() for name, p in layers.named_parameters() if p.ndim == 2 and "down_proj" not in name]
    assert operations() - once == 2 * sum(weights) * sum(prompt + response for prompt, response in LENGTHS)


@pytest.mark.parametrize("change", [{"paramOffload": True}, {"optimizerOffload": True}])
def test_offloading_changes_no_bit(model: Path, change: dict[str, Any]) -> None:
    results = []
    for options in (options_for(model), options_for(model, actor={"optim": {"lr": 1e-3}, "fsdp": change})):
        updater = updater_for(options)
        for step in (1, 2):
            updater.update(sequences_of(LENGTHS, seed=step, mini_batches=[4, 4]), step)
        results.append(whole_parameters(updater.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_each_mini_batch_and_epoch_is_one_update(model: Path) -> None:
    updater = updater_for(options_for(model, actor={"ppoEpochs": 2}))
    updater.update(sequences_of(LENGTHS, mini_batches=[3, 5]), step=1)
    assert updater.state.updates == 4
    assert updater.state.step == 1
    assert float(next(iter(updater.optimizer.state().values()))["step"]) == 4


def test_the_learning_rate_ends_with_the_run_whatever_its_steps_had(model: Path) -> None:
    """Planned: 4 steps of 2 updates. The second has one mini-batch alone, and then prompts for one step are gone."""
    data = {"maxPromptLength": 64, "maxResponseLength": 64, "trainBatchSize": 2}
    actor = {"ppoMiniBatchSize": 1, "optim": {"lr": 1.0e-3, "lrScheduler": "linear"}}
    updater = updater_for(options_for(model, data=data, actor=actor))
    rates = []
    for step, (mini_batches, total_steps) in enumerate([([3, 5], 4), ([8], 4), ([3, 5], 3)], 1):
        rates.append(updater.update(sequences_of(LENGTHS, mini_batches=mini_batches), step, total_steps)["actor/lr"])
    # Updates 1 and 2 of 8; 3 of 3 + 2 * 2; 4 and 5 of 5.
    assert rates == pytest.approx([1e-3 * (7 / 8 + 6 / 8) / 2, 1e-3 * 4 / 7, 1e-3 * (1 / 5 + 0) / 2])


def part_of(whole: Sequences, kept: list[int], mini_batches: list[int]) -> Sequences:
    """The sequences `kept` as a batch of their own."""

    def cut(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        return np.concatenate([values[offsets[i] : offsets[i + 1]] for i in kept])

    prompts, responses = whole.prompt_lengths[kept], whole.response_lengths[kept]
    return Sequences(
        prompts,
        responses,
        cut(whole.token_ids, whole.token_offsets),
        np.concatenate([[0], np.cumsum(prompts + responses)]),
        np.concatenate([[0], np.cumsum(responses)]),
        cut(whole.response_mask, whole.response_offsets),
        {name: cut(values, whole.response_offsets) for name, values in whole.values.items()},
        mini_batches,
    )


def test_mini_batches_are_normalised_apart(model: Path) -> None:
    both, _ = recorded_update(options_for(model), sequences_of(LENGTHS, mini_batches=[3, 5]), single_rank())
    first = part_of(sequences_of(LENGTHS), [0, 1, 2], [3])
    alone, _ = recorded_update(options_for(model), first, single_rank())
    assert relative_difference(both[0], alone[0]) < 1e-6


def test_the_gradient_norm_is_clipped_to_its_limit(model: Path) -> None:
    sequences = sequences_of(LENGTHS)
    free, _ = recorded_update(options_for(model, actor={"optim": {"clipGrad": 1e9}}), sequences, single_rank())
    norm = sum(float(g.double().square().sum()) for g in free[0].values()) ** 0.5
    _, metrics = recorded_update(options_for(model, actor={"optim": {"clipGrad": norm / 4}}), sequences, single_rank())
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)

    updater = updater_for(options_for(model, actor={"optim": {"clipGrad": norm / 4, "betas": [0.0, 0.999]}}))
    updater.update(sequences, 1)
    first_moments = [state["exp_avg"].full_tensor() for state in updater.optimizer.state().values()]
    clipped = sum(float(m.double().square().sum()) for m in first_moments) ** 0.5
    assert clipped == pytest.approx(norm / 4, rel=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(model: Path) -> None:
    updater = updater_for(options_for(model))
    before = whole_parameters(updater.model)
    sequences = sequences_of(LENGTHS)
    sequences.values["advantages"][0] = np.inf
    sequences.response_mask[0] = 1
    metrics = updater.update(sequences, 1)
    after = whole_parameters(updater.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics["actor/skipped_updates"] == 1
    updater.update(sequences_of(LENGTHS), 2)
    assert any(not torch.equal(before[name], value) for name, value in whole_parameters(updater.model).items())


def test_a_mini_batch_that_is_masked_whole_moves_no_weight(model: Path) -> None:
    updater = updater_for(options_for(model))
    updater.update(sequences_of(LENGTHS), 1)  # momentum
    before = whole_parameters(updater.model)
    sequences = sequences_of(LENGTHS)
    sequences.response_mask[:] = 0
    assert updater.update(sequences, 2)["actor/skipped_updates"] == 1
    assert all(torch.equal(before[name], value) for name, value in whole_parameters(updater.model).items())


SILENT = [1, 2, 5]  # sequences whose advantage is zero


def with_silent(seed: int = 0, mini_batches: list[int] | None = None) -> Sequences:
    sequences = sequences_of(LENGTHS, seed=seed, mini_batches=mini_batches)
    for i in SILENT:
        sequences.values["advantages"][sequences.response_offsets[i] : sequences.response_offsets[i + 1]] = 0.0
    return sequences


def computed_sequences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of sequences of each forward pass."""
    counts: list[int] = []

    def counted(*arguments: Any) -> Any:
        batch = collate(*arguments)
        counts.append(len(batch.lengths))
        return batch

    monkeypatch.setattr(update, "collate", counted)
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", ["vanilla", "gspo", "cispo"])
def test_sequences_without_advantage_are_left_out_of_the_update_and_change_nothing(
    model: Path, mode: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, sequences = options_for(model, actor={"lossAggMode": mode, "lossMode": loss}), with_silent()
    counts = computed_sequences(monkeypatch)
    (gradient,), metrics = recorded_update(options, sequences, single_rank())
    assert sum(counts) == metrics["actor/trained_sequences"] == len(LENGTHS) - len(SILENT)
    monkeypatch.setattr(Updater, "_trained", lambda _, sequences: np.ones(sequences.count, dtype=bool))
    (whole,), whole_metrics = recorded_update(options, sequences, single_rank())
    assert sum(counts) == 2 * len(LENGTHS) - len(SILENT)
    assert relative_difference(gradient, whole) < 1e-6
    assert metrics["actor/pg_loss"] == pytest.approx(whole_metrics["actor/pg_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "term", [{"useKLLoss": True}, {"entropyCoeff": 0.01}, {"lossMode": "grpo_worker.algorithms.losses:vanilla"}]
)
def test_sequences_without_advantage_stay_where_another_term_may_move_them(model: Path, term: dict[str, Any]) -> None:
    _, metrics = recorded_update(options_for(model, actor=term), with_silent(), single_rank())
    assert metrics["actor/trained_sequences"] == len(LENGTHS)


def test_metrics_are_over_the_sequences_that_were_computed(model: Path) -> None:
    kept = [i for i in range(len(LENGTHS)) if i not in SILENT]
    _, metrics = recorded_update(options_for(model), with_silent(mini_batches=[2, 6]), single_rank())
    _, expected = recorded_update(options_for(model), part_of(with_silent(), kept, [1, 4]), single_rank())
    for name in ("entropy", "ppo_kl", "pg_clipfrac", "pg_clipfrac_lower"):
        assert metrics[f"actor/{name}"] == pytest.approx(expected[f"actor/{name}"], rel=1e-5), name


def test_a_mini_batch_of_zero_advantages_is_a_skipped_update(model: Path) -> None:
    updater = updater_for(options_for(model))
    updater.update(sequences_of(LENGTHS), 1)  # momentum
    before, moments = whole_parameters(updater.model), updater.optimizer.state()
    first = {name: {key: value.clone() for key, value in state.items()} for name, state in moments.items()}
    sequences = sequences_of(LENGTHS)
    sequences.values["advantages"][:] = 0.0
    metrics = updater.update(sequences, 2)
    assert (metrics["actor/skipped_updates"], metrics["actor/trained_sequences"], updater.state.updates) == (1, 0, 2)
    assert not any(math.isnan(value) for value in metrics.values())
    assert all(torch.equal(before[name], value) for name, value in whole_parameters(updater.model).items())
    after = updater.optimizer.state()
    assert all(torch.equal(after[name][key], value) for name, state in first.items() for key, value in state.items())


def test_norms_have_no_weight_decay(model: Path) -> None:
    updater = updater_for(options_for(model, actor={"optim": {"weightDecay": 0.5}}))
    decay = {p: g["weight_decay"] for g in updater.optimizer.adamw.param_groups for p in g["params"]}
    by_name = {name: decay[p] for name, p in updater.optimizer.parameters.items()}
    assert by_name["model.norm.weight"] == 0
    assert by_name["model.layers.0.self_attn.q_norm.weight"] == 0
    assert by_name["model.layers.0.mlp.up_proj.weight"] == 0.5


def test_missing_values_are_named(model: Path) -> None:
    updater = updater_for(options_for(model, actor={"useKLLoss": True}))
    sequences = sequences_of(LENGTHS)
    del sequences.values["ref_log_probs"]
    with pytest.raises(DataError, match="ref_log_probs"):
        updater.update(sequences, 1)


def test_a_users_loss_is_found_by_module_or_file(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from grpo_worker.algorithms.losses import PolicyLossOutput\n"
        "def reinforce(inputs):\n"
        "    return PolicyLossOutput(-inputs.advantages * inputs.log_probs * inputs.mask, {})\n"
    )
    _, metrics = recorded_update(
        options_for(model, actor={"lossMode": f"{file}:reinforce"}), sequences_of(LENGTHS), single_rank()
    )
    assert metrics["actor/grad_norm"] > 0
    assert policy_loss("grpo_worker.algorithms.losses:vanilla").__wrapped__ is policy_loss("vanilla")  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"actor\.lossMode: .*no function 'nothing'"):
        policy_loss(f"{file}:nothing")
    with pytest.raises(DataError, match=r"actor\.lossMode: no loss is called 'ppo'"):
        policy_loss("ppo")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("raise KeyError('beta')", "raised"),
        ("return inputs.log_probs", "must return a PolicyLossOutput"),
        ("return PolicyLossOutput(inputs.log_probs[:1], {})", "must return a PolicyLossOutput"),
    ],
)
def test_a_users_loss_that_goes_wrong_names_its_field(tmp_path: Path, model: Path, body: str, part: str) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(f"from grpo_worker.algorithms.losses import PolicyLossOutput\ndef wrong(inputs):\n    {body}\n")
    with pytest.raises(DataError, match=rf"actor\.lossMode: .*{part}"):
        recorded_update(options_for(model, actor={"lossMode": f"{file}:wrong"}), sequences_of(LENGTHS), single_rank())
