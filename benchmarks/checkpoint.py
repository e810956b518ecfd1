"""How long a checkpoint keeps training waiting, beside a plain synchronous `torch.save` of as many bytes.

Invariant: both write the same number of bytes to the same directory from the same process, in turns, and the disk's
queue is drained (`sync`) before each, which is not timed. Ours is the trainer's own `ShardStore` on one rank: it copies
the state, lets training go on, writes and hashes and flushes in a thread. The peer returns when `torch.save` does (the
bytes may still be in the page cache); `with_fsync` is the same until they are on the disk, as ours are when it is done.

    python -m benchmarks.checkpoint --directory /tmp
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from grpo_worker.config.job import Spec
from grpo_worker.trainer.distributed import Ranks, join, leave
from grpo_worker.trainer.model import PolicyModel, build_policy
from grpo_worker.trainer.optimizer import PolicyOptimizer
from grpo_worker.trainer.options import TrainerOptions
from grpo_worker.trainer.shards import ShardStore
from grpo_worker.trainer.update import TrainerState

LIMIT_SECONDS = 600.0
# 108 million parameters, 25 million of them the tied embedding.
HUNDRED_MILLION: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def save_model(directory: Path, size: str) -> None:
    """A random model in Hugging Face format: the demo's, or one of 100 million parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from grpo_worker.demo.model import build_model

    torch.manual_seed(0)
    model = build_model(0) if size == "tiny" else Qwen3ForCausalLM(Qwen3Config(**HUNDRED_MILLION))
    model.save_pretrained(directory)


def build(model_directory: Path, ranks: Ranks) -> tuple[PolicyModel, ShardStore]:
    """The trainer's model, optimizer states and store of shards."""
    data = {"maxPromptLength": 64, "maxResponseLength": 64}
    options = TrainerOptions(Spec.model_validate({"model": {"path": str(model_directory)}, "data": data}), "cpu")
    model = build_policy(options, ranks.mesh)
    optimizer = PolicyOptimizer(model, options.spec.actor.optim, ranks, offload=False)
    return model, ShardStore(model, optimizer, ranks, torch.float32, model_directory, 0, LIMIT_SECONDS)


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def our_save(shards: ShardStore, directory: Path) -> dict[str, float]:
    """Seconds that training stands still, and seconds until the checkpoint is whole and on the disk."""
    os.sync()
    stall_seconds = shards.save(directory, TrainerState(step=1))
    status = shards.status(LIMIT_SECONDS)
    if not status.done or status.error:
        raise SystemExit(f"the checkpoint was not written: {status.error or 'too slow'}")
    return {
        "stall": stall_seconds,
        "background": status.seconds - stall_seconds,
        "bytes": float(size_bytes(directory)),
    }


def plain_save(tensors: list[torch.Tensor], path: Path) -> dict[str, float]:
    """Seconds of a synchronous torch.save, without and with the flush to disk."""
    os.sync()
    started = time.perf_counter()
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        saved = time.perf_counter() - started
        os.fsync(file.fileno())
    return {"save": saved, "with_fsync": time.perf_counter() - started}


def tensors_of(total_bytes: int, like: int = 64) -> list[torch.Tensor]:
    """`total_bytes` in `like` tensors of random float32."""
    return [torch.randn(max(total_bytes // 4 // like, 1)) for _ in range(like)]


def compare(size: str, directory: Path, ranks: Ranks, rounds: int) -> dict[str, Any]:
    """Medians of alternating saves; ratios are of neighbours. The first round is not counted."""
    save_model(directory / "model", size)
    model, shards = build(directory / "model", ranks)
    ours: list[dict[str, float]] = []
    plain: list[dict[str, float]] = []
    tensors: list[torch.Tensor] = []
    for number in range(rounds + 1):
        target = directory / f"checkpoint-{number}"
        target.mkdir()
        mine = our_save(shards, target)
        tensors = tensors or tensors_of(int(mine["bytes"]))
        theirs = plain_save(tensors, directory / f"plain-{number}.pt")
        shutil.rmtree(target)
        (directory / f"plain-{number}.pt").unlink()
        if number:
            ours.append(mine)
            plain.append(theirs)

    def median(runs: list[dict[str, float]], key: str) -> float:
        return round(statistics.median(run[key] for run in runs), 4)

    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": int(ours[0]["bytes"]),
        "stall_seconds": median(ours, "stall"),
        "stall_seconds_each": [round(run["stall"], 4) for run in ours],
        "background_seconds": median(ours, "background"),
        "torch_save_seconds": median(plain, "save"),
        "torch_save_seconds_each": [round(run["save"], 4) for run in plain],
        "torch_save_with_fsync_seconds": median(plain, "with_fsync"),
        "stall_over_torch_save": round(
            statistics.median(a["stall"] / b["save"] for a, b in zip(ours, plain, strict=True)), 3
        ),
        "stall_over_torch_save_with_fsync": round(
            statistics.median(a["stall"] / b["with_fsync"] for a, b in zip(ours, plain, strict=True)), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default the system's temporary one")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is not counted")
    arguments = parser.parse_args()
    ranks = join("cpu", LIMIT_SECONDS, seed=0)
    result: dict[str, Any] = {"rounds": arguments.rounds, "threads": torch.get_num_threads()}
    for size in ("tiny", "100M"):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            result[size] = compare(size, Path(directory), ranks, arguments.rounds)
    leave()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
