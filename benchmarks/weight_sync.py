"""Weight sync by each transport beside a bare copy of as many bytes the same way, in one run on one machine.

Invariant: all move the same number of bytes between the same two processes, in turns. `store` is the whole way over loopback: the
trainer's tensors are copied into the snapshot and hashed (publish), pulled over parallel streams, and every tensor's checksum is verified;
its bare twin is one sender and one receiver that touch nothing. `nccl` is the whole way over a group: packed, summed on both sides,
broadcast bucket by bucket; its bare twin broadcasts buckets of memory over the same group. Prints one JSON object.

    python benchmarks/weight_sync.py --gib 1 --streams 4
    python benchmarks/weight_sync.py --gib 1.2 --device cuda    # the group's ends on two GPUs, over NCCL
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

from grpo_worker.protocol.messages import GroupPlace, StoreSource
from grpo_worker.weightsync import wire
from grpo_worker.weightsync.broadcast import WeightDigest, WeightGroup, open_meeting_point
from grpo_worker.weightsync.client import pull
from grpo_worker.weightsync.host_memory import HostMemory
from grpo_worker.weightsync.manifest import TensorSpec
from grpo_worker.weightsync.server import WeightServer
from grpo_worker.weightsync.snapshot import SnapshotStore

BUCKET_BYTES = 256 << 20
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


def trainer(pipe: Connection, total_bytes: int, device: torch.device) -> None:
    """Publishes on request, and sends raw bytes on request; both over each transport."""
    torch.set_num_threads(2)
    specs = tensor_specs(total_bytes)
    tensors = {spec.name: torch.randn(spec.shape, dtype=torch.float32).to(torch.bfloat16) for spec in specs}
    store = SnapshotStore()
    server = WeightServer(store, "127.0.0.1", 0, "token")
    raw = torch.randint(0, 255, (sum(spec.size_bytes for spec in specs),), dtype=torch.uint8)
    listener = socket.create_server(("127.0.0.1", 0))
    meeting_point = open_meeting_point("127.0.0.1")
    pipe.send((listener.getsockname()[1], specs, raw.numel(), meeting_point.port))
    group = WeightGroup(place(meeting_point.port, 0), device)
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    memory = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device)
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
        elif order == "group":
            group.send(iter(on_device.items()), specs)
        elif order == "bare group":
            broadcast(group, memory, raw.numel())
        else:
            with listener.accept()[0] as connection:
                wire.tune(connection, 60)
                data = raw.numpy().data
                for start in range(0, len(data), wire.CHUNK_BYTES):
                    connection.sendall(data[start : start + wire.CHUNK_BYTES])
    server.close()
    store.close()


def place(port: int, rank: int) -> GroupPlace:
    return GroupPlace(
        host="127.0.0.1",
        port=port,
        generation=1,
        rank=rank,
        world_size=2,
        patience_seconds=60,
        bucket_bytes=BUCKET_BYTES,
    )


def broadcast(group: WeightGroup, memory: torch.Tensor, total_bytes: int) -> None:
    """Of as many bytes as the weights have, from or into the same memory again and again."""
    for start in range(0, total_bytes, BUCKET_BYTES):
        group._wait(group._pass_on(memory[: min(BUCKET_BYTES, total_bytes - start)]))


def group_sync(pipe: Connection, group: WeightGroup, specs: list[TensorSpec]) -> float:
    """Seconds until all tensors are here and summed."""
    pipe.send("group")
    started = time.perf_counter()
    digest = WeightDigest()
    for _ in group.receive(specs, digest):
        pass
    digest.hexdigest()
    return time.perf_counter() - started


def bare_broadcast(pipe: Connection, group: WeightGroup, memory: torch.Tensor, total_bytes: int) -> float:
    pipe.send("bare group")
    started = time.perf_counter()
    broadcast(group, memory, total_bytes)
    return time.perf_counter() - started


def raw_copy(pipe: Connection, port: int, buffer: memoryview) -> float:
    """Seconds for all bytes over one connection into a buffer that is mapped already."""
    pipe.send("raw")
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        wire.tune(connection, 60)
        for start in range(0, len(buffer), wire.CHUNK_BYTES):
            wire.receive_exactly(connection, buffer[start : start + wire.CHUNK_BYTES])
    return time.perf_counter() - started


def store_sync(pipe: Connection, memory: HostMemory, streams: int) -> dict[str, float]:
    """Seconds of a publish and of a verified pull."""
    pipe.send("publish")
    source: StoreSource
    source, publish_seconds = pipe.recv()
    started = time.perf_counter()
    pull(source, token="token", into=memory.reserve, streams=streams, deadline=time.monotonic() + 300)
    pull_seconds = time.perf_counter() - started
    return {"publish": publish_seconds, "pull_and_verify": pull_seconds, "total": publish_seconds + pull_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model in GiB")
    parser.add_argument("--streams", type=int, default=4, help="parallel connections of the pull")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is not counted")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of the group's ends; cuda takes two GPUs"
    )
    arguments = parser.parse_args()
    ours, theirs = (torch.device(f"cuda:{index}" if arguments.device == "cuda" else "cpu") for index in (0, 1))
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=trainer, args=(other, int(arguments.gib * 2**30), theirs), daemon=True
    )
    process.start()
    port, specs, raw_bytes, meeting_port = pipe.recv()
    host = HostMemory()
    group = WeightGroup(place(meeting_port, 1), ours)
    memory = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=ours)
    raw_seconds, sync_seconds, group_seconds, bare_seconds = [], [], [], []
    for _ in range(arguments.rounds + 1):  # alternating, so that a busy moment hits both
        sync_seconds.append(store_sync(pipe, host, arguments.streams))
        raw_seconds.append(raw_copy(pipe, port, host.reserve(raw_bytes)))
        group_seconds.append(group_sync(pipe, group, specs))
        bare_seconds.append(bare_broadcast(pipe, group, memory, raw_bytes))
    pipe.send("stop")
    process.join(30)
    parts = {part: statistics.median(seconds[part] for seconds in sync_seconds[1:]) for part in sync_seconds[0]}
    raw, grouped, bare = (statistics.median(seconds[1:]) for seconds in (raw_seconds, group_seconds, bare_seconds))
    print(json.dumps({
        "bytes": raw_bytes, "tensors": len(specs), "streams": arguments.streams, "rounds": arguments.rounds, "cpus": os.cpu_count(),
        "raw_copy_seconds": round(raw, 3), "raw_copy_gb_per_second": round(raw_bytes / raw / 1e9, 3),
        **{f"{part}_seconds": round(seconds, 3) for part, seconds in parts.items()},
        "sync_gb_per_second": round(raw_bytes / parts["total"] / 1e9, 3),
        "pull_gb_per_second": round(raw_bytes / parts["pull_and_verify"] / 1e9, 3),
        "ratio": round(raw / parts["total"], 3), "pull_ratio": round(raw / parts["pull_and_verify"], 3),
        "group_backend": "nccl" if arguments.device == "cuda" else "gloo",
        "group_seconds": round(grouped, 3), "group_gb_per_second": round(raw_bytes / grouped / 1e9, 3),
        "bare_broadcast_seconds": round(bare, 3), "group_ratio": round(bare / grouped, 3),
        "load_average": round(os.getloadavg()[0], 2),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
