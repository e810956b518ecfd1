"""One rank of a trainer for test_trainer_ranks.py: runs a named scenario, rank 0 writes what it saw.

Usage: rank_process.py MODEL OUTPUT SCENARIO[=CHECKPOINT]... `serve` is the real trainer process, on the port that
OUTPUT holds. The ranks are those of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; SHARD_SIZE of them share a copy of the model.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from msgspec.structs import replace as replace_field
from torch.distributed.fsdp import fully_shard
from trainer_helpers import (
    batch_message,
    options_for,
    recorded_update,
    sequences_of,
    whole_parameters,
    without_old_log_probs,
)

from grpo_worker.checkpoint import write_manifest
from grpo_worker.errors import GRPOError
from grpo_worker.protocol.messages import (
    GroupPlace,
    LoadRequest,
    LogProbsRequest,
    PublishRequest,
    SaveRequest,
    UpdateRequest,
)
from grpo_worker.trainer import hf_format, loop
from grpo_worker.trainer import model as policy
from grpo_worker.trainer.distributed import Ranks, broadcast_bytes, join, leave, make_mesh
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.failures import OperationRefused
from grpo_worker.trainer.main import run_rank
from grpo_worker.trainer.model import build_policy, tensor_specs
from grpo_worker.weightsync.broadcast import WeightDigest, WeightGroup

LENGTHS = [(5, 7), (3, 20), (10, 4), (6, 6), (2, 1), (4, 11), (8, 3), (1, 9)]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
SAVE_LIMIT_SECONDS = 60.0


def train(engine: TrainerEngine, first: int, last: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for step in range(first, last + 1):
        batch = batch_message(LENGTHS, seed=step, mini_batches=[4, 4])
        metrics = engine.run(UpdateRequest(step=step, batch=batch)).metrics  # type: ignore[union-attr]
    return metrics


def save(engine: TrainerEngine, directory: Path, step: int) -> Any:
    engine.run(SaveRequest(directory=str(directory), step=step))
    return engine.save_status(SAVE_LIMIT_SECONDS)


def gradients(model: Path, ranks: Ranks, _: Path) -> Any:
    result = {}
    for mode in MODES:
        options = options_for(model, actor={"lossAggMode": mode, "useKLLoss": True, "ppoMicroBatchSizePerGPU": 2})
        result[mode] = recorded_update(options, sequences_of(LENGTHS), ranks)
    result["own"] = recorded_update(options_for(model), without_old_log_probs(sequences_of(LENGTHS)), ranks)
    # Two sequences on more ranks than one: some of them compute padding alone.
    result["padding"] = recorded_update(
        options_for(model, actor={"ppoMaxTokenLenPerGPU": 8}), sequences_of([(9, 20)]), ranks
    )
    return result


def reductions(model: Path, ranks: Ranks, _: Path) -> Any:
    """Gradients of one update, reduced when the field says, by (ranks that share a copy of the model, field)."""
    result = {}
    for shard_size in sorted({1, ranks.world_size // 2, ranks.world_size}):
        meshed = replace(ranks, mesh=make_mesh("cpu", ranks.world_size, shard_size))
        for when in ("auto", "microBatch", "update"):
            actor = {"fsdp": {"gradientReduction": when}, "ppoMicroBatchSizePerGPU": 1}
            result[shard_size, when] = recorded_update(options_for(model, actor=actor), sequences_of(LENGTHS), meshed)
    return result


def straight(model: Path, ranks: Ranks, checkpoint: Path) -> Any:
    """Four steps, with a save after the second; log-probs and the published digest at the end."""
    engine = TrainerEngine(options_for(model, algorithm={"useKLInReward": True}), ranks)
    train(engine, 1, 2)
    torch.rand(3)
    status = save(engine, checkpoint, 2)
    if ranks.is_first:
        write_manifest(checkpoint, status.files, epoch=0, step=2)  # the coordinator's part of a save
    middle = whole_parameters(engine.model)
    noise = torch.rand(4)
    metrics = train(engine, 3, 4)
    reply = engine.run(LogProbsRequest(batch=batch_message(LENGTHS), actor=True, reference=True))
    source = engine.run(PublishRequest(version=4)).store  # type: ignore[union-attr]
    parameters = whole_parameters(engine.model)
    every_copy: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(every_copy, parameters)
    manifest = engine.store.current if engine.store else None
    names = [(entry.name, entry.shape, entry.dtype) for entry in manifest.tensors] if manifest else []
    engine.close()
    return {
        "status": (status.done, status.error, status.files),
        "middle": middle,
        "parameters": parameters,
        "noise": noise,
        "metrics": metrics,
        "log_probs": reply.log_probs.numpy().tolist(),  # type: ignore[union-attr]
        "ref_log_probs": reply.ref_log_probs.numpy().tolist(),  # type: ignore[union-attr]
        "digest": source.digest if source else "",
        "published": names,
        "copies_alike": all(torch.equal(c[name], value) for c in every_copy for name, value in parameters.items()),
    }


def resumed(model: Path, ranks: Ranks, checkpoint: Path) -> Any:
    """A fresh process: load the checkpoint of `straight`, then its steps three and four."""
    engine = TrainerEngine(options_for(model), ranks)
    step = engine.run(LoadRequest(directory=str(checkpoint))).step  # type: ignore[union-attr]
    middle = whole_parameters(engine.model)
    noise = torch.rand(4)
    metrics = train(engine, 3, 4)
    source = engine.run(PublishRequest(version=4)).store  # type: ignore[union-attr]
    parameters = whole_parameters(engine.model)
    engine.close()
    return {
        "step": step,
        "middle": middle,
        "parameters": parameters,
        "noise": noise,
        "metrics": metrics,
        "digest": source.digest if source else "",
    }


def broadcasting(model: Path, ranks: Ranks, _: Path) -> Any:
    """Versions over a group whose other member is a thread of rank 0; what comes of a member that never comes; older versions."""
    engine = TrainerEngine(options_for(model, network={"weightSync": "nccl"}), ranks)
    specs = tensor_specs(engine.model, torch.float32)
    port = engine.run(PublishRequest(version=0)).meeting_port  # type: ignore[union-attr]
    place = GroupPlace(
        host="127.0.0.1", port=port, generation=1, rank=0, world_size=2, patience_seconds=20.0, bucket_bytes=20_000
    )

    def take() -> list[tuple[dict[str, torch.Tensor], str]]:
        group, taken = WeightGroup(replace_field(place, rank=1), torch.device("cpu")), []
        for _ in range(2):
            digest = WeightDigest()
            taken.append((dict(group.receive(specs, digest)), digest.hexdigest()))
        return taken

    taking = ThreadPoolExecutor(1).submit(take) if ranks.is_first else None
    models, replies = [], []
    for version in (1, 2):
        train(engine, version, version)
        models.append(whole_parameters(engine.model))
        replies.append(engine.run(PublishRequest(version=version, store=version == 2, group=place)))
    alone = replace_field(place, generation=2, patience_seconds=0.5)
    lost = engine.run(PublishRequest(version=2, store=False, group=alone))
    stored = engine.run(PublishRequest(version=2))
    train(engine, 3, 3)
    said = []
    for version in (2, 1):
        try:
            engine.run(PublishRequest(version=version))
        except OperationRefused as refusal:
            said.append((type(refusal.error).__name__, str(refusal)))
    engine.close()
    return {
        "models": models,
        "replies": replies,
        "taken": taking and taking.result(20),
        "lost": lost,
        "stored": stored,
        "said": said,
    }


def handing_over(model: Path, ranks: Ranks, _: Path) -> Any:
    """Versions in pairs: each rank's partner is a thread beside it. Then rank 0 has none; then the last rank's does not come."""
    policy.GATHER_BYTES = 20_000  # some parameters alone, others together
    engine = TrainerEngine(options_for(model, placement="Colocated"), ranks)
    specs = tensor_specs(engine.model, torch.float32)
    ports: list[Any] = [0] * ranks.world_size
    dist.all_gather_object(ports, engine.run(PublishRequest(version=0)).meeting_port, group=ranks.control)  # type: ignore[union-attr]
    everybody = tuple(range(ranks.world_size))
    place = GroupPlace(
        host="127.0.0.1", port=ports[0], generation=1, rank=0, world_size=2, patience_seconds=20.0, bucket_bytes=20_000, pair=0
    )  # fmt: skip

    def take(generation: int) -> tuple[dict[str, torch.Tensor], str]:
        own = replace_field(place, generation=generation, rank=1, pair=ranks.rank)
        group, digest = WeightGroup(own, torch.device("cpu")), WeightDigest()
        return dict(group.receive(specs, digest)), digest.hexdigest()

    thread, found = ThreadPoolExecutor(1), []
    for generation, partners, patience in ((1, everybody, 20.0), (2, everybody[1:], 20.0), (3, everybody, 1.0)):
        train(engine, generation, generation)
        comes = ranks.rank in partners and not (generation == 3 and ranks.rank == ranks.world_size - 1)
        taking = thread.submit(take, generation) if comes else None
        group = replace_field(place, generation=generation, pairs=partners, patience_seconds=patience)
        reply = engine.run(PublishRequest(version=generation, store=False, group=group))
        of_all: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(of_all, taking and taking.result(20), group=ranks.control)
        found.append({"model": whole_parameters(engine.model), "digest": reply.digest, "taken": of_all})  # type: ignore[union-attr]
    engine.close()
    return found


def gathering(model: Path, ranks: Ranks, _: Path) -> Any:
    """Parameters whose rows the ranks do not divide, or that are fewer than ranks: gathered together and by PyTorch's own way."""
    parts = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(2, 1), torch.nn.Linear(4, 16))
    for parameter in parts.parameters():
        dist.broadcast(parameter.data, 0)
    fully_shard(parts, mesh=ranks.mesh)
    named: Any = list(parts.named_parameters())
    together = dict(policy.Gather(named, torch.bfloat16, ranks.device).tensors())
    return {name: (together[name], parameter.full_tensor().detach().bfloat16()) for name, parameter in named}


def damaged(model: Path, ranks: Ranks, checkpoint: Path) -> Any:
    """The checkpoint of `straight` with one changed bit in rank 1's shard: what each rank says. Then it is whole again, and loads."""
    engine = TrainerEngine(options_for(model), ranks)
    shard = checkpoint / "state" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    said: list[str] = [""] * ranks.world_size
    for flip in (1, 1):
        data[len(data) // 2] ^= flip
        dist.barrier(ranks.control)
        if ranks.is_first:
            shard.write_bytes(data)
        dist.barrier(ranks.control)
        try:
            engine.run(LoadRequest(directory=str(checkpoint)))
        except OperationRefused as refusal:
            dist.all_gather_object(said, str(refusal), group=ranks.control)
    before = bytes_read()
    engine.run(LoadRequest(directory=str(checkpoint)))
    read: list[int] = [0] * ranks.world_size
    dist.all_gather_object(read, bytes_read() - before, group=ranks.control)
    parameters = whole_parameters(engine.model)
    engine.close()
    return {"said": said, "read": read, "parameters": parameters}


def bytes_read() -> int:
    """By this process with read calls, whether from the disk or from its cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def high_water_bytes() -> int:
    """The most memory that this process had resident since it last wrote 5 to clear_refs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def loading(model: Path, ranks: Ranks, _: Path) -> list[int]:
    """Bytes that each rank takes at most, over what it had, while the model is built and loaded."""
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_bytes()
    build_policy(options_for(model), ranks.mesh)
    peaks: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(peaks, high_water_bytes() - before)
    return peaks


def late(model: Path, output: Path, startup_seconds: float) -> int:
    """Rank 1 begins to load when the limit of a collective has long passed. Rank 0 writes what became of it."""
    ranks = join("cpu", 2.0, seed=0, rendezvous_timeout_seconds=60.0)
    if ranks.rank == 1:
        time.sleep(8.0)
    said, code = "all here", 0
    try:
        loop.load(options_for(model, failurePolicy={"startupTimeoutSeconds": startup_seconds}), ranks, "")
        broadcast_bytes(b"t" if ranks.is_first else None, ranks)
    except GRPOError as error:
        said, code = str(error), int(error.exit_code)
    if ranks.is_first:
        torch.save(said, output)
    return code


def main() -> None:
    model, output, *scenarios = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    if scenarios == ["serve"]:
        try:
            port = int(output.read_text())
            trainer, network = {"processGroupTimeoutSeconds": 60.0}, {"trainerPort": port}
            run_rank(options_for(model, trainer=trainer, network=network))
        except GRPOError as error:
            sys.exit(error.exit_code)
        return
    if scenarios[0].startswith("late"):
        sys.exit(late(model, output, float(scenarios[0].partition("=")[2])))
    ranks = join("cpu", 60.0, seed=0, shard_size=int(os.environ.get("SHARD_SIZE", "-1")))
    hf_format.MIN_FILE_BYTES = 1 << 14  # a tiny model's weights in a file for each rank too
    results = {}
    for scenario in scenarios:
        name, _, checkpoint = scenario.partition("=")
        run = {
            "gradients": gradients,
            "reductions": reductions,
            "straight": straight,
            "resumed": resumed,
            "damaged": damaged,
            "broadcasting": broadcasting,
            "handing_over": handing_over,
            "gathering": gathering,
            "loading": loading,
        }[name]
        results[scenario] = run(model, ranks, Path(checkpoint))
    if ranks.is_first:
        torch.save(results, output)
    leave()


if __name__ == "__main__":
    main()
