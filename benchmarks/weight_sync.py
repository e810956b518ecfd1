"""Weight sync by the `store` transport beside a raw socket copy of as many bytes, in one run on one machine.

Invariant: both sides move the same number of bytes between the same two processes over loopback. The sync side is the
whole way: the trainer's tensors are copied into the snapshot and hashed (publish), pulled over parallel streams, and
every tensor's checksum is verified; the raw side is one sender and one receiver that touch nothing. Prints one JSON
object.

    python benchmarks/weight_sync.py --gib 1 --streams 4
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.connection import Connection

import torch

from grpo_worker.protocol.messages import StoreSource
from grpo_worker.rollout.staging import StagingMemory
from grpo_worker.weightsync import wire
from grpo_worker.weightsync.client import pull
from grpo_worker.weightsync.manifest import TensorSpec
from grpo_worker.weightsync.server import WeightServer
from grpo_worker.weightsync.snapshot import SnapshotStore

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 3072, 65536  # the shape of a Qwen3 0.6B layer, and half its embedding


def tensor_specs(total_bytes: int) -> list[TensorSpec]:
    """Layers of a small language model in bfloat16 until the size is reached."""
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj": (2 * HIDDEN, HIDDEN),
        "k_proj": (HIDDEN, HIDDEN),
        "v_proj": (HIDDEN, HIDDEN),
        "o_proj": (HIDDEN, 2 * HIDDEN),
    }
    shapes |= {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    shapes |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "q_norm": (128,), "k_norm": (128,)}
    specs = [TensorSpec("embed_tokens", (VOCABULARY, HIDDEN), "bfloat16")]
    while sum(spec.size_bytes for spec in specs) < total_bytes:
        layer = len(specs) // len(shapes)
        specs += [TensorSpec(f"layers.{layer}.{name}", shape, "bfloat16") for name, shape in shapes.items()]
    return specs


def trainer(pipe: Connection, total_bytes: int) -> None:
    """Publishes on request, and sends raw bytes on request."""
    torch.set_num_threads(2)
    specs = tensor_specs(total_bytes)
    tensors = {spec.name: torch.randn(spec.shape, dtype=torch.float32).to(torch.bfloat16) for spec in specs}
    store = SnapshotStore()
    server = WeightServer(store, "127.0.0.1", 0, "token")
    raw = torch.randint(0, 255, (sum(spec.size_bytes for spec in specs),), dtype=torch.uint8)
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send((listener.getsockname()[1], len(specs), raw.numel()))
    version = 0
    while (order := pipe.recv()) != "stop":
        if order == "publish":
            version += 1
            started = time.perf_counter()
            with store.begin(version, specs) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                source = server.source(writer.commit())
            pipe.send((source, time.perf_counter() - started))
        else:
            with listener.accept()[0] as connection:
                wire.tune(connection, 60)
                data = raw.numpy().data
                for start in range(0, len(data), wire.CHUNK_BYTES):
                    connection.sendall(data[start : start + wire.CHUNK_BYTES])
    server.close()
    store.close()


def raw_copy(pipe: Connection, port: int, buffer: memoryview) -> float:
    """Seconds for all bytes over one connection into a buffer that is mapped already."""
    pipe.send("raw")
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        wire.tune(connection, 60)
        for start in range(0, len(buffer), wire.CHUNK_BYTES):
            wire.receive_exactly(connection, buffer[start : start + wire.CHUNK_BYTES])
    return time.perf_counter() - started


def store_sync(pipe: Connection, staging: StagingMemory, streams: int) -> dict[str, float]:
    """Seconds of a publish and of a verified pull."""
    pipe.send("publish")
    source: StoreSource
    source, publish_seconds = pipe.recv()
    started = time.perf_counter()
    pull(source, token="token", into=staging.reserve, streams=streams, deadline=time.monotonic() + 300)
    pull_seconds = time.perf_counter() - started
    return {"publish": publish_seconds, "pull_and_verify": pull_seconds, "total": publish_seconds + pull_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model in GiB")
    parser.add_argument("--streams", type=int, default=4, help="parallel connections of the pull")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is not counted")
    arguments = parser.parse_args()
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=trainer, args=(other, int(arguments.gib * 2**30)), daemon=True
    )
    process.start()
    port, tensors, raw_bytes = pipe.recv()
    staging = StagingMemory()
    raw_seconds, sync_seconds = [], []
    for _ in range(arguments.rounds + 1):  # alternating, so that a busy moment hits both
        sync_seconds.append(store_sync(pipe, staging, arguments.streams))
        raw_seconds.append(raw_copy(pipe, port, staging.reserve(raw_bytes)))
    pipe.send("stop")
    process.join(30)
    parts = {part: statistics.median(seconds[part] for seconds in sync_seconds[1:]) for part in sync_seconds[0]}
    raw = statistics.median(raw_seconds[1:])
    print(json.dumps({
        "bytes": raw_bytes, "tensors": tensors, "streams": arguments.streams, "rounds": arguments.rounds, "cpus": os.cpu_count(),
        "raw_copy_seconds": round(raw, 3), "raw_copy_gb_per_second": round(raw_bytes / raw / 1e9, 3),
        **{f"{part}_seconds": round(seconds, 3) for part, seconds in parts.items()},
        "sync_gb_per_second": round(raw_bytes / parts["total"] / 1e9, 3),
        "pull_gb_per_second": round(raw_bytes / parts["pull_and_verify"] / 1e9, 3),
        "ratio": round(raw / parts["total"], 3), "pull_ratio": round(raw / parts["pull_and_verify"], 3),
        "load_average": round(os.getloadavg()[0], 2),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
