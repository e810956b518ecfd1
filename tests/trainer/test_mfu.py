"""Model FLOPs by hand, and what becomes of them in a step's metrics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import options_for, save_tiny_model, sequences_of, single_rank
from transformers import AutoModelForCausalLM

from grpo_worker.trainer import update
from grpo_worker.trainer.mfu import ModelFlops, device_peak, parity_tokens, peak_flops
from grpo_worker.trainer.model import build_policy
from grpo_worker.trainer.optimizer import PolicyOptimizer
from grpo_worker.trainer.packing import PackingPlan, cost, plan_micro_batches
from grpo_worker.trainer.update import TrainerState, Updater, compute_log_probs
from grpo_worker.trainer.user_loss import policy_loss

# Of `save_tiny_model`: 2 layers of width 64, 4 heads of 32 (2 for keys and values), MLP 96, vocabulary 64.
ATTENTION = 64 * (4 * 32) + 2 * 64 * (2 * 32) + (4 * 32) * 64
NORMS = 2 * 64 + 2 * 32
LAYER = ATTENTION + 3 * 64 * 96 + NORMS
TIED = 2 * LAYER + 64 * 64 + 64  # the head, and the last norm


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_are_those_that_tokens_are_multiplied_with(tmp_path: Path, tied: bool) -> None:
    options = options_for(save_tiny_model(tmp_path, tied=tied))
    whole = ModelFlops.of(AutoModelForCausalLM.from_pretrained(options.spec.model.path))
    assert whole == ModelFlops(parameters=TIED, layers=2, heads=4, head_size=32)
    policy = build_policy(options, single_rank().mesh)
    assert ModelFlops.of(policy.lm) == whole  # sharded as well


def test_flops_by_hand() -> None:
    flops = ModelFlops(parameters=1000, layers=2, heads=4, head_size=32)
    # 6 N a token; QK^T and AV are 2 * 2 T^2 H Q a layer forward, three times that with backward, and half of it is masked.
    assert flops.training([10]) == 6 * 1000 * 10 + 2 * (3 * 2 * 2 * 10**2 * 4 * 32) / 2
    assert flops.training([10, 20]) == flops.training([10]) + flops.training([20])


def test_a_sequences_cost_is_in_proportion_to_its_flops() -> None:
    flops = ModelFlops(parameters=51200, layers=2, heads=4, head_size=32)
    parity = parity_tokens(flops)
    assert parity == 200
    assert cost(200, parity) == 2 * 200
    for tokens in (1, 200, 3000):
        assert 6 * flops.parameters * cost(tokens, parity) == pytest.approx(flops.training([tokens]))


def test_micro_batches_are_planned_by_the_models_own_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def recorded(*arguments: Any) -> PackingPlan:
        asked.append(arguments[-1])
        return plan_micro_batches(*arguments)

    monkeypatch.setattr(update, "plan_micro_batches", recorded)
    options, ranks = options_for(save_tiny_model(tmp_path)), single_rank()
    policy = build_policy(options, ranks.mesh)
    optimizer = PolicyOptimizer(policy, options.spec.actor.optim, ranks, offload=False)
    sequences = sequences_of([(5, 7), (3, 20)])
    Updater(policy, optimizer, options, ranks, policy_loss("vanilla"), TrainerState()).update(sequences, step=1)
    compute_log_probs(policy, sequences, options, ranks, options.spec.rollout)
    assert asked == [TIED / (2 * 4 * 32)] * 2


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A4000", None),
        ("Some GPU", None),
    ],
)
def test_peaks_by_the_devices_name(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


def test_without_a_known_peak_there_is_no_utilization(tmp_path: Path) -> None:
    assert device_peak(torch.device("cpu"), torch.bfloat16) is None
    options, ranks = (
        options_for(save_tiny_model(tmp_path), actor={"ppoEpochs": 2, "optim": {"lr": 1e-3}}),
        single_rank(),
    )
    policy = build_policy(options, ranks.mesh)
    optimizer = PolicyOptimizer(policy, options.spec.actor.optim, ranks, offload=False)
    updater = Updater(policy, optimizer, options, ranks, policy_loss("vanilla"), TrainerState())
    lengths = [(5, 7), (3, 20), (10, 4)]
    metrics = updater.update(sequences_of(lengths, mini_batches=[1, 2]), step=1)
    assert not any("mfu" in name or name == "flops" for name in metrics)
    assert metrics["perf/max_cpu_memory_gib"] > 0
    updater.peak_flops = 1e9
    metrics = updater.update(sequences_of(lengths, mini_batches=[1, 2]), step=2)
    assert updater.flops is not None
    expected = 2 * updater.flops.training([12, 23, 14]) / metrics["timing_s/trainer_update"] / 1e9
    assert metrics["perf/mfu/actor"] == pytest.approx(expected)
