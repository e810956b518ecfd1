"""The memory of each phase follows from the document and the model's shape, and a job that does not fit is told why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_documents import DOCUMENT
from safetensors.numpy import save_file

from grpo_worker.config import load_job
from grpo_worker.config.job import Spec
from grpo_worker.errors import ConfigError
from grpo_worker.memory_plan import GIB, MemoryPlan, ModelShape, plan_memory

H100 = int(79.1 * GIB)
# Qwen3's, from their config.json; parameters as the files of the checkpoints have them.
SMALL = ModelShape(596_049_920, 28, 1024, 3072, 2048, 1024, 151_936, 1)
LARGE = ModelShape(8_190_735_360, 36, 4096, 12288, 4096, 1024, 151_936, 2)


@pytest.fixture
def spec(tmp_path: Path) -> Any:
    def of(*overrides: str) -> Spec:
        path = tmp_path / "job.yaml"
        path.write_text(DOCUMENT)
        return load_job(path, ["placement=Colocated", *overrides]).spec

    return of


def test_what_one_rank_holds_of_a_small_model(spec: Any) -> None:
    plan = plan_memory(spec("model.enableGradientCheckpointing=false", "rollout.gpuMemoryUtilization=0.5"), SMALL, H100)
    size = SMALL.parameters
    updating = plan.updating.parts
    assert updating["master weights"] == 4 * size
    assert updating["optimizer's moments"] == 8 * size
    assert updating["gathered weights"] == 2 * size
    assert updating["gradients"] == 8 * size, "this micro-batch's, and those that were reduced"
    # 28 layers x (4 x 1024 of the residual stream, 2048 + 2 x 1024 projected, twice 2048 + 1024 for their norms and rotation,
    # 2048 of attention, 3 x 3072 of the MLP) x 2 bytes x 16,384 tokens
    assert updating["activations"] == 28 * (4096 + 4096 + 6144 + 2048 + 9216) * 2 * 16384
    assert plan.generating.parts["engine"] == H100 // 2
    assert not plan.moments_leave
    plan.check()


def test_measured_beside_planned(spec: Any) -> None:
    """One H100, the 0.6B shape: 35.1 GiB allocated at a budget of 16,384 tokens, 56.6 at 32,768 (docs/benchmarks.md)."""
    for tokens, measured in ((16384, 35.1), (32768, 56.6)):
        job = spec("model.enableGradientCheckpointing=false", f"actor.ppoMaxTokenLenPerGPU={tokens}")
        plan = plan_memory(job, SMALL, H100)
        of_others = plan.updating.parts["sleeping engine"] + plan.updating.parts["trainer's context"]
        planned = (plan.updating.total - of_others) / GIB
        assert measured < planned < 1.12 * measured


def test_shards_and_offloads_take_their_part_away(spec: Any) -> None:
    one = plan_memory(spec("trainer.gpusPerNode=1"), LARGE, H100)
    eight = plan_memory(spec("trainer.gpusPerNode=8", "rollout.tensorParallelSize=2"), LARGE, H100)
    for part in ("master weights", "optimizer's moments"):
        assert eight.updating.parts[part] == one.updating.parts[part] // 8
    assert eight.syncing.parts["engine's weights"] == one.syncing.parts["engine's weights"] // 2
    copies = plan_memory(spec("trainer.gpusPerNode=8", "trainer.nodes=2", "actor.fsdp.shardSize=8"), LARGE, H100)
    assert copies.updating.parts["master weights"] == eight.updating.parts["master weights"]
    offloaded = plan_memory(spec("actor.fsdp={paramOffload: true, optimizerOffload: true}"), LARGE, H100)
    assert offloaded.updating.parts["master weights"] == 0
    assert "optimizer's moments" not in {name for name, size in offloaded.updating.parts.items() if size}
    assert not one.updating.parts["reference"]
    assert plan_memory(spec("actor.useKLLoss=true"), LARGE, H100).updating.parts["reference"] == 2 * LARGE.parameters


@pytest.mark.parametrize("recomputation", [None, "selective", "full"])
def test_recomputation_keeps_fewer_activations(spec: Any, recomputation: str | None) -> None:
    more = {None: "selective", "selective": "full"}
    if recomputation in more:
        assert SMALL.activations(more[recomputation]) < SMALL.activations(recomputation)
    else:
        one_layer = SMALL.activations(None) // SMALL.layers
        assert SMALL.activations("full") == SMALL.layers * SMALL.hidden + one_layer


def test_moments_leave_only_as_far_as_memory_asks(spec: Any) -> None:
    settings = ("rollout.gpuMemoryUtilization=0.8",)
    stays = plan_memory(spec("trainer.gpusPerNode=8", *settings), LARGE, H100)
    leaves = plan_memory(spec("trainer.gpusPerNode=4", *settings), LARGE, H100)
    assert (stays.moments_leave, leaves.moments_leave) == (False, True)
    assert "optimizer's moments" in stays.generating.parts
    assert "optimizer's moments" not in leaves.generating.parts
    assert "optimizer's moments" in leaves.updating.parts
    # with them the engine would not have had room
    with_moments = leaves.generating.total + leaves.updating.parts["optimizer's moments"]
    assert with_moments > 0.97 * H100 >= leaves.generating.total
    leaves.check()


def test_the_engines_cache_is_what_its_share_leaves(spec: Any) -> None:
    def plan(*overrides: str) -> MemoryPlan:
        return plan_memory(spec("rollout.gpuMemoryUtilization=0.5", *overrides), SMALL, H100)

    half = H100 // 2 - 2 * SMALL.parameters
    few, many = plan("rollout.maxNumSeqs=1"), plan("rollout.maxNumSeqs=512")
    assert 0.8 * half < many.kv_cache_bytes < few.kv_cache_bytes < half
    assert few.kv_cache_bytes - many.kv_cache_bytes == 511 * 151_936 * 4 * 3, "float32 logits of each sequence"
    none = plan_memory(spec("rollout.gpuMemoryUtilization=0.05"), SMALL, H100)
    with pytest.raises(ConfigError, match=r"for its KV cache: raise rollout\.gpuMemoryUtilization"):
        none.check()


def test_a_job_that_cannot_fit_is_refused_with_the_arithmetic(spec: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_memory(spec("model.enableGradientCheckpointing=false"), LARGE, H100).check()
    message = str(caught.value)
    assert message.startswith("placement: Colocated does not fit on a device of 79.1 GiB (76.7 usable).")
    assert "while the trainer updates: sleeping engine 4.0 + " in message
    assert "master weights 30.5 + optimizer's moments 61.0 + gathered weights 15.3 + gradients 61.0" in message
    for remedy in (
        "model.enableGradientCheckpointing: true", "actor.ppoMaxTokenLenPerGPU below 16384", "actor.fsdp.optimizerOffload: true",
        "more trainer.gpusPerNode",
    ):  # fmt: skip
        assert remedy in message
    assert "ref.fsdp.paramOffload" not in message, "there is no reference"
    eight = ("trainer.gpusPerNode=8", "rollout.tensorParallelSize=2", "actor.useKLLoss=true")
    plan_memory(spec(*eight), LARGE, H100).check()


def test_the_shape_is_that_of_the_directory(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "vocab_size": 10, "tie_word_embeddings": True,
    }  # fmt: skip
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float32)}, tmp_path / "model.safetensors")

    def shape(**changes: Any) -> ModelShape | None:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return ModelShape.of(tmp_path)

    assert shape() == ModelShape(22, 2, 8, 16, 24, 12, 10, 1)
    assert shape(tie_word_embeddings=False) == ModelShape(22, 2, 8, 16, 24, 12, 10, 2)
    assert shape(head_dim=None, num_key_value_heads=None) == ModelShape(22, 2, 8, 16, 8, 8, 10, 1)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert ModelShape.of(tmp_path) == shape()
    assert shape(num_experts=8) is None
    assert shape(intermediate_size=None) is None
