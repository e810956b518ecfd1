"""Several ranks, as real processes over Gloo: the same gradients, checkpoints that reshard, weights that publish."""

import io
import json
import math
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from rank_process import LENGTHS, MODES, straight
from trainer_helpers import (
    options_for,
    recorded_update,
    relative_difference,
    save_tiny_model,
    sequences_of,
    single_rank,
    without_old_log_probs,
)
from transformers import AutoModelForCausalLM

from grpo_worker.model_files import tensor_headers
from grpo_worker.trainer.launch import Placement, run_ranks

PROGRAM = Path(__file__).with_name("rank_process.py")


def run(model: Path, output: Path, ranks: int, scenarios: list[str], exit_code: int = 0) -> Any:
    command = [sys.executable, str(PROGRAM), str(model), str(output), *scenarios]
    assert run_ranks(command, Placement(nodes=1, ranks_per_node=ranks), stop=threading.Event()) == exit_code
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {ranks: folder / f"of-{ranks}" for ranks in (1, 2, 8)}


@pytest.fixture(scope="module")
def on_two_ranks(model: Path, checkpoints: dict[int, Path]) -> Any:
    scenarios = ["gradients", f"straight={checkpoints[2]}", "broadcasting", "handing_over", "gathering"]
    results = run(model, checkpoints[2].with_suffix(".pt"), 2, scenarios)
    return {name.partition("=")[0]: result for name, result in results.items()}


@pytest.fixture(scope="module")
def in_two_copies(model: Path, checkpoints: dict[int, Path]) -> Any:
    """Eight ranks, of which four share a copy of the model, as on two nodes."""
    scenarios = [
        "reductions",
        f"straight={checkpoints[8]}",
        f"resumed={checkpoints[8]}",
        "broadcasting",
        "handing_over",
        "gathering",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARD_SIZE", "4")
        results = run(model, checkpoints[8].with_suffix(".pt"), 8, scenarios)
    return {name.partition("=")[0]: result for name, result in results.items()}


@pytest.fixture(scope="module")
def unbroken(model: Path, checkpoints: dict[int, Path], on_two_ranks: Any) -> dict[int, Any]:
    """Four steps in one process, by number of ranks; one rank runs right here."""
    return {1: straight(model, single_rank(), checkpoints[1]), 2: on_two_ranks["straight"]}


@pytest.fixture(scope="module")
def again(model: Path, checkpoints: dict[int, Path], unbroken: dict[int, Any]) -> dict[str, Any]:
    """Fresh processes that load and go on: from 1 on 1, from 2 on 2, from 2 on 1."""
    one = run(model, checkpoints[1].with_suffix(".1"), 1, [f"resumed={checkpoints[1]}", f"resumed={checkpoints[2]}"])
    scenarios = [f"resumed={checkpoints[2]}", f"damaged={checkpoints[2]}"]
    two = run(model, checkpoints[2].with_suffix(".2"), 2, scenarios)
    return {
        "1 on 1": one[f"resumed={checkpoints[1]}"],
        "2 on 1": one[f"resumed={checkpoints[2]}"],
        "2 on 2": two[f"resumed={checkpoints[2]}"],
        "damaged": two[f"damaged={checkpoints[2]}"],
    }


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_have_the_gradient_of_one(model: Path, on_two_ranks: Any, mode: str) -> None:
    options = options_for(model, actor={"lossAggMode": mode, "useKLLoss": True})
    gradients, metrics = recorded_update(options, sequences_of(LENGTHS), single_rank())
    other, other_metrics = on_two_ranks["gradients"][mode]
    assert relative_difference(other[0], gradients[0]) < 1e-6
    for name in ("pg_loss", "kl_loss", "entropy", "pg_clipfrac", "ppo_kl", "grad_norm"):
        assert other_metrics[f"actor/{name}"] == pytest.approx(metrics[f"actor/{name}"], rel=1e-4), name


def test_two_ranks_make_old_log_probs_and_their_metrics_as_one_does(model: Path, on_two_ranks: Any) -> None:
    sequences = without_old_log_probs(sequences_of(LENGTHS))
    gradients, metrics = recorded_update(options_for(model), sequences, single_rank())
    other, other_metrics = on_two_ranks["gradients"]["own"]
    assert relative_difference(other[0], gradients[0]) < 1e-6
    names = [name for name in metrics if name.startswith(("rollout_corr/", "training/"))]
    assert "training/rollout_probs_diff_mean" in names
    for name in names:
        assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def test_a_rank_without_a_sequence_changes_nothing(model: Path, on_two_ranks: Any) -> None:
    gradients, _ = recorded_update(options_for(model), sequences_of([(9, 20)]), single_rank())
    assert relative_difference(on_two_ranks["gradients"]["padding"][0][0], gradients[0]) < 1e-6


def test_a_rank_that_loads_slowly_is_waited_for_longer_than_for_a_collective(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "said.pt", 2, ["late=60"]) == "all here"


def test_ranks_that_never_come_are_named(model: Path, tmp_path: Path) -> None:
    said = run(model, tmp_path / "said.pt", 2, ["late=1"], exit_code=75)
    assert "rank 1 of 2 had not loaded the model 1 s after rank 0" in said
    assert "failurePolicy.startupTimeoutSeconds" in said


def test_a_rank_never_holds_much_more_than_its_shard_while_it_loads(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 16384}
    large = save_tiny_model(tmp_path / "model", num_attention_heads=8, num_key_value_heads=8, head_dim=128, **sizes)
    model_bytes = (large / "model.safetensors").stat().st_size
    peaks = run(large, tmp_path / "result.pt", 2, ["loading"])["loading"]
    print(f"model {model_bytes / 1e6:.0f} MB, at most {[round(peak / 1e6) for peak in peaks]} MB a rank")
    assert model_bytes > 400e6
    assert max(peaks) < 0.7 * model_bytes  # the shard is half of it


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_save_load_steps_equal_unbroken_steps_bit_for_bit(
    unbroken: dict[int, Any], again: dict[str, Any], ranks: int
) -> None:
    expected, resumed = unbroken[ranks], again[f"{ranks} on {ranks}"]
    assert expected["status"][:2] == (True, "")
    assert resumed["step"] == 2
    assert torch.equal(resumed["noise"], expected["noise"])
    for name, value in expected["parameters"].items():
        assert torch.equal(resumed["parameters"][name], value), name
    assert resumed["metrics"]["actor/grad_norm"] == expected["metrics"]["actor/grad_norm"]
    assert resumed["digest"] == expected["digest"]


@pytest.mark.parametrize("when", ["auto", "microBatch", "update"])
@pytest.mark.parametrize("shard_size", [1, 4, 8])
def test_copies_of_the_model_and_late_reductions_have_the_gradient_of_one_rank(
    model: Path, in_two_copies: Any, shard_size: int, when: str
) -> None:
    gradients, metrics = recorded_update(options_for(model), sequences_of(LENGTHS), single_rank())
    other, other_metrics = in_two_copies["reductions"][shard_size, when]
    assert relative_difference(other[0], gradients[0]) < 1e-6
    assert other_metrics["actor/grad_norm"] == pytest.approx(metrics["actor/grad_norm"], rel=1e-5)


def test_two_copies_of_the_model_train_save_resume_and_publish_as_one(
    unbroken: dict[int, Any], in_two_copies: Any, checkpoints: dict[int, Path]
) -> None:
    straight, resumed = in_two_copies["straight"], in_two_copies["resumed"]
    assert straight["copies_alike"]
    assert relative_difference(straight["parameters"], unbroken[1]["parameters"]) < 1e-5
    assert straight["log_probs"] == pytest.approx(unbroken[1]["log_probs"], abs=1e-3)
    assert straight["published"] == unbroken[1]["published"]
    assert resumed["digest"] == straight["digest"] and torch.equal(resumed["noise"], straight["noise"])
    # Each shard was written once, not once a copy: weights and two moments, float32.
    values = sum(value.numel() for value in straight["parameters"].values())
    shards = sum(path.stat().st_size for path in (checkpoints[8] / "state").glob("*.distcp"))
    assert 3 * 4 * values < shards < 1.5 * 3 * 4 * values


def test_two_ranks_checkpoint_loads_on_one(unbroken: dict[int, Any], again: dict[str, Any]) -> None:
    for name, value in unbroken[2]["middle"].items():
        assert torch.equal(again["2 on 1"]["middle"][name], value), name
    assert relative_difference(again["2 on 1"]["parameters"], unbroken[2]["parameters"]) < 1e-5


def test_one_and_two_ranks_train_alike(unbroken: dict[int, Any]) -> None:
    one, two = unbroken[1], unbroken[2]
    assert relative_difference(two["parameters"], one["parameters"]) < 1e-5
    assert two["log_probs"] == pytest.approx(one["log_probs"], abs=1e-3)
    assert two["ref_log_probs"] == pytest.approx(one["ref_log_probs"], abs=1e-5)
    assert one["ref_log_probs"] != pytest.approx(one["log_probs"], abs=1e-3)


def test_damage_in_one_ranks_shard_is_refused_by_all_and_the_trainer_goes_on(
    unbroken: dict[int, Any], again: dict[str, Any], checkpoints: dict[int, Path]
) -> None:
    damage = again["damaged"]
    for said in damage["said"]:
        assert said.startswith(f"{checkpoints[2]}: ")
        assert "state/__1_0.distcp: its content changed (checksum xxh3:" in said
    for name, value in unbroken[2]["middle"].items():
        assert torch.equal(damage["parameters"][name], value), name


def test_a_resume_reads_each_byte_of_the_state_once(again: dict[str, Any], checkpoints: dict[int, Path]) -> None:
    state = sum(path.stat().st_size for path in (checkpoints[2] / "state").iterdir())
    metadata = (checkpoints[2] / "state" / ".metadata").stat().st_size  # DCP reads it twice on each rank
    manifest = (checkpoints[2] / "manifest.json").stat().st_size
    scalars = 4 * io.DEFAULT_BUFFER_SIZE  # that a rank looks up in the other's shard
    assert state < sum(again["damaged"]["read"]) <= state + 3 * metadata + 2 * manifest + scalars < 1.2 * state


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_saved_file_is_listed_hashed_and_readable_by_the_group(
    unbroken: dict[int, Any], checkpoints: dict[int, Path], ranks: int
) -> None:
    checkpoint, files = checkpoints[ranks], unbroken[ranks]["status"][2]
    held = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(files) == held - {"manifest.json"}
    for name, digest in files.items():
        assert digest == f"xxh3:{xxhash.xxh3_64_hexdigest((checkpoint / name).read_bytes())}"
        assert (checkpoint / name).stat().st_mode & 0o640 == 0o640
    for directory in [checkpoint, *(p for p in checkpoint.rglob("*") if p.is_dir())]:
        assert stat.S_IMODE(directory.stat().st_mode) & 0o750 == 0o750
    assert json.loads((checkpoint / "state" / "trainer.json").read_text())["world_size"] == ranks


def test_the_actor_folder_loads_in_transformers(unbroken: dict[int, Any], checkpoints: dict[int, Path]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(checkpoints[2] / "actor", dtype=torch.float32)
    parameters = dict(loaded.named_parameters())
    assert set(parameters) == set(unbroken[2]["middle"])
    for name, value in unbroken[2]["middle"].items():
        assert torch.equal(parameters[name], value), name


def test_each_rank_writes_weights_of_its_own(checkpoints: dict[int, Path]) -> None:
    actor = checkpoints[2] / "actor"
    index = json.loads((actor / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in actor.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(math.prod(shape) * 4 for _, shape, _ in tensor_headers(actor))


def test_published_tensors_are_the_checkpoints_names_in_order(model: Path, unbroken: dict[int, Any]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = [(name, tuple(p.shape), "float32") for name, p in plain.named_parameters()]
    assert unbroken[1]["published"] == unbroken[2]["published"] == expected


@pytest.mark.parametrize("ranks", ["on_two_ranks", "in_two_copies"])
def test_a_group_gets_the_gathered_model_and_the_trainer_survives_a_group_that_fails(
    ranks: str, request: pytest.FixtureRequest
) -> None:
    seen = request.getfixturevalue(ranks)["broadcasting"]
    for model, reply, (tensors, digest) in zip(seen["models"], seen["replies"], seen["taken"], strict=True):
        assert tensors.keys() <= model.keys()
        assert all(torch.equal(tensor, model[name]) for name, tensor in tensors.items())
        assert (reply.digest, reply.group_error) == (digest, "")
    first, second = seen["replies"]
    assert first.store is None
    assert second.store.version == 2
    assert "weight group 2 of 2 members failed: its members did not meet" in seen["lost"].group_error
    assert (seen["lost"].store, seen["lost"].digest) == (None, "")
    assert seen["stored"].store.digest == second.store.digest


@pytest.mark.parametrize("ranks", ["on_two_ranks", "in_two_copies"])
def test_every_ranks_partner_gets_the_gathered_model_and_the_digest_is_rank_0s(
    ranks: str, request: pytest.FixtureRequest
) -> None:
    whole, without_first, without_last = request.getfixturevalue(ranks)["handing_over"]
    size = 2 if ranks == "on_two_ranks" else 8
    for seen, missing in ((whole, None), (without_first, 0), (without_last, size - 1)):
        assert [number for number, taken in enumerate(seen["taken"]) if taken is None] == [missing] * (
            missing is not None
        )
        for taken in filter(None, seen["taken"]):
            tensors, digest = taken
            assert digest == seen["digest"]
            assert len(tensors) > 10
            assert all(torch.equal(tensor, seen["model"][name]) for name, tensor in tensors.items())
    assert len({seen["digest"] for seen in (whole, without_first, without_last)}) == 3


@pytest.mark.parametrize("ranks", ["on_two_ranks", "in_two_copies"])
def test_parameters_that_the_ranks_do_not_divide_are_gathered_whole(ranks: str, request: pytest.FixtureRequest) -> None:
    for name, (together, alone) in request.getfixturevalue(ranks)["gathering"].items():
        assert together.dtype == torch.bfloat16, name
        assert torch.equal(together, alone), name


def test_a_version_that_the_trainer_has_no_more_is_refused(on_two_ranks: Any) -> None:
    said = on_two_ranks["broadcasting"]["said"]
    assert [kind for kind, _ in said] == ["VersionNotHeldError"] * 2
    assert [text.partition(":")[0] for _, text in said] == ["version 2 is gone", "version 1 is gone"]
