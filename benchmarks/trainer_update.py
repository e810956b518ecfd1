"""What the trainer alone makes of a GPU: seconds, model FLOPs over the device's (MFU) and memory of whole updates, by variant.

Invariant: every variant trains the same random model on the same random sequences, each of the full length, in one update a step and without
a pass for old log-probs, as the trainer's process does it. The first update compiles and is told apart; the rest are given as their median.

    python -m benchmarks.trainer_update --shape 0.6b --tokens 520 --sequences 512 --variant '' --variant 'eager={"model": {"compile": false}}'

With --profile FILE the kernels of one more update go there as a table, the costliest first.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.__main__ import machine_facts
from benchmarks.side_by_side.inputs import SHAPES, make_model
from grpo_worker.config.job import Spec
from grpo_worker.protocol.messages import Array, TrainBatch
from grpo_worker.trainer.batch import Sequences
from grpo_worker.trainer.distributed import Ranks, join
from grpo_worker.trainer.engine import TrainerEngine
from grpo_worker.trainer.options import TrainerOptions


def random_batch(sequences: int, tokens: int, prompt: int, samples: int, vocabulary: int) -> Sequences:
    """Sequences of `tokens` tokens, `prompt` of them the prompt that `samples` neighbours share. The engine's log-probs are those of a
    uniform policy."""
    random = np.random.default_rng(0)
    response = tokens - prompt
    ids = random.integers(0, vocabulary, (sequences, tokens))
    ids[:, :prompt] = ids[::samples, :prompt].repeat(samples, axis=0)[:sequences]
    return Sequences.of(
        TrainBatch(
            prompt_lengths=Array.of([prompt] * sequences, "int32"),
            response_lengths=Array.of([response] * sequences, "int32"),
            token_ids=Array.of(ids.reshape(-1), "int32"),
            rollout_log_probs=Array.of(np.full(sequences * response, -np.log(vocabulary)), "float32"),
            advantages=Array.of(np.repeat(random.normal(size=sequences), response), "float32"),
        )
    )


def measure(
    options: TrainerOptions, ranks: Ranks, batch: Sequences, updates: int, table: Path | None
) -> dict[str, Any]:
    """Seconds and MFU of `updates` updates after the first."""
    engine = TrainerEngine(options, ranks)
    rows = []
    for step in range(1, updates + 2):
        started = time.perf_counter()
        row = engine.updater.update(batch, step)
        rows.append(row | {"seconds": time.perf_counter() - started})
    if table is not None:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            engine.updater.update(batch, updates + 2)
        order = "self_cuda_time_total" if ranks.device.type == "cuda" else "self_cpu_time_total"
        table.write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=100))
    engine.close()
    figures = {"seconds": "seconds", "mfu": "perf/mfu/actor", "peak_gib": "perf/max_memory_allocated_gb"}
    found = {
        figure: statistics.median(row[name] for row in rows[1:]) for figure, name in figures.items() if name in rows[1]
    }
    return {"first_seconds": rows[0]["seconds"], **found, "micro_batches": rows[1]["perf/micro_batches"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--tokens", type=int, default=520, help="of a sequence, the prompt's included")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="sequences that have the same prompt")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--budget", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=JSON", help="sections of the spec")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="where the last variant's kernels go")
    arguments = parser.parse_args()
    ranks = join("cuda" if torch.cuda.is_available() else "cpu", 300.0, seed=0)
    prompt = arguments.prompt_tokens
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    batch = random_batch(arguments.sequences, arguments.tokens, prompt, arguments.samples, vocabulary)
    result: dict[str, Any] = {"arguments": vars(arguments) | {"profile": str(arguments.profile)}, **machine_facts()}
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), SHAPES[arguments.shape])
        variants = arguments.variant or [""]
        for variant in variants:
            name, _, text = variant.partition("=")
            sections: dict[str, dict[str, Any]] = {
                "model": {"path": directory, "enableGradientCheckpointing": False},
                "data": {"maxPromptLength": prompt, "maxResponseLength": arguments.tokens - prompt},
                "actor": {"ppoMaxTokenLenPerGPU": arguments.budget},
            }
            for section, values in json.loads(text or "{}").items():
                sections[section] = sections.get(section, {}) | values
            options = TrainerOptions(Spec.model_validate(sections), "cuda" if ranks.device.type == "cuda" else "cpu")
            table = arguments.profile if variant is variants[-1] else None
            result[name or "default"] = row = measure(options, ranks, batch, arguments.updates, table)
            print(name or "default", row, flush=True)
            gc.collect()
            torch._dynamo.reset()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
