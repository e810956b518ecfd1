"""What only a GPU can show: variable-length flash attention, compiled layers and bfloat16 against float32. Skipped without.

The old log-probs are the float32 model's own. With arbitrary ones the comparison would be ill-conditioned: a rounding error moves single
tokens over the clip's edge, and each that moves changes the gradient by its whole share (seen: cosine 0.97 in place of 0.9997).
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from test_trainer_shared_prompts import grouped
from torch._dynamo.utils import counters
from trainer_helpers import batch_message, options_for, plain_log_probs, save_tiny_model

from grpo_worker.checkpoint import write_manifest
from grpo_worker.protocol.messages import Array, PublishRequest
from grpo_worker.trainer.batch import Sequences
from grpo_worker.trainer.distributed import Ranks, join
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.update import compute_log_probs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

LENGTHS = [(5, 7), (3, 40), (10, 4), (6, 6), (1, 1), (2, 30)]
# A head width of 64 and more: what the flash kernels and vLLM take.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.02}


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return join("cuda", 120.0, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"compile": False}},
        {"model": {"compile": True}},
        {"model": {"compile": True, "gradientCheckpointing": "selective"}},
        {"model": {"compile": False, "useRemovePadding": False}},
        {"model": {"compile": False, "dtype": "float32"}},
        {"actor": {"optim": {"lr": 1e-3}, "fsdp": {"paramOffload": True, "optimizerOffload": True}}},
    ],
    ids=["packed", "compiled", "selective", "padded", "float32", "offloaded"],
)
def test_training_on_a_gpu_follows_float32(tmp_path: Path, ranks: Ranks, change: dict[str, Any]) -> None:
    model = save_tiny_model(tmp_path / "model", **WIDE)
    batch = batch_message(LENGTHS, mini_batches=[3, 3])
    exact = options_for(model, device="cuda", model={"dtype": "float32", "compile": False})
    options = options_for(model, device="cuda", **change)
    wanted, actual = TrainerEngine(exact, ranks), TrainerEngine(options, ranks)
    old_log_probs = compute_log_probs(wanted.model, Sequences.of(batch), exact, ranks, exact.spec.rollout)[0]
    sequences = Sequences.of(msgspec.structs.replace(batch, old_log_probs=Array.of(old_log_probs, "float32")))
    for step in (1, 2):
        expected = compute_log_probs(wanted.model, sequences, exact, ranks, exact.spec.rollout)[0]
        found = compute_log_probs(actual.model, sequences, options, ranks, options.spec.rollout)[0]
        assert np.abs(found - expected).mean() < 0.005 * step
        metrics = actual.updater.update(sequences, step)
        norm = wanted.updater.update(sequences, step)["actor/grad_norm"]
        assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=0.01 * step)  # bfloat16 has 8 bits
        assert metrics["perf/max_memory_allocated_gb"] > 0
    actual.shards.save(tmp_path / "checkpoint", actual.state)
    status = actual.save_status(60.0)
    assert status.done and not status.error
    write_manifest(tmp_path / "checkpoint", status.files, epoch=0, step=2)
    assert actual.shards.load(tmp_path / "checkpoint").step == 2
    source = actual.publish(PublishRequest(version=1)).store
    assert source is not None and source.total_bytes > 0
    wanted.close()
    actual.close()


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.05])
def test_updates_compile_nothing_that_was_not_compiled_at_the_start(
    tmp_path: Path, ranks: Ranks, entropy_coeff: float
) -> None:
    torch.compiler.reset()
    model = save_tiny_model(tmp_path / "model", **WIDE)
    options = options_for(model, device="cuda", actor={"entropyCoeff": entropy_coeff})
    engine = TrainerEngine(options, ranks)
    compiled = counters["stats"]["unique_graphs"]
    for step, lengths in enumerate((LENGTHS, [(17, 47), (16, 16), (33, 31)], [(8, 8)] * 9), 1):
        engine.updater.update(Sequences.of(batch_message(lengths, seed=step)), step)
    assert counters["stats"]["unique_graphs"] == compiled > 0
    engine.close()


@pytest.mark.parametrize("compile", [False, True])
def test_prompts_that_are_shared_change_nothing_but_rounding(tmp_path: Path, ranks: Ranks, compile: bool) -> None:
    model, sequences = save_tiny_model(tmp_path / "model", **WIDE), grouped()
    exact = plain_log_probs(model, sequences, 1.0)[0]
    errors = {}
    for share in (False, True):
        options = options_for(model, device="cuda", model={"compile": compile}, actor={"sharePrompts": share})
        engine = TrainerEngine(options, ranks)
        found = compute_log_probs(engine.model, sequences, options, ranks, options.spec.rollout)[0]
        errors[share] = float(np.abs(found - exact).mean())
        assert engine.updater.update(sequences, 1)["actor/grad_norm"] > 0
        engine.close()
    assert errors[True] < 0.005 and errors[True] < 1.5 * errors[False], errors


def test_float32_on_a_gpu_is_float32(tmp_path: Path, ranks: Ranks) -> None:
    model, sequences = save_tiny_model(tmp_path, **WIDE), Sequences.of(batch_message(LENGTHS))
    found = {}
    for dtype in ("float32", "tf32"):
        options = options_for(model, device="cuda", model={"dtype": dtype, "compile": False})
        engine = TrainerEngine(options, ranks)
        found[dtype] = compute_log_probs(engine.model, sequences, options, ranks, options.spec.rollout)[0]
        engine.close()
    expected = plain_log_probs(model, sequences, 1.0)[0]
    errors = {dtype: float(np.abs(log_probs - expected).max()) for dtype, log_probs in found.items()}
    assert errors["float32"] < 1e-5 < errors["tf32"], errors
