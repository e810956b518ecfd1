"""Rows per second of `PromptDataset.iterate()` beside the `datasets` library streaming the same Parquet.

Both read the same file with the same tokenizer and length limit in the same process, and yield the token ids with every
other column of the row. The passes alternate, and the ratio is the median of the ratios of neighbouring passes: rates
by the wall clock, and by CPU time of this process, which other work on the machine disturbs less. Prints one JSON
object. The tokenizer is a byte-level BPE trained here, so nothing is downloaded.

Nearly all of the time of both is the tokenizer. The peer calls it as its users do (`tokenizer(batch)`); our encoder
asks the same tokenizer for ids without character offsets, and that is most of the difference.

Kept out of the comparison, as neither is throughput: what the first pass of each imports (one pass is not timed), and
the fixed seconds that `datasets` sleeps at the end of each shuffled stream to let its threads stop.

    python benchmarks/data_rows.py --rows 50000
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread each: the job's other processes need the cores

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PROMPT_LIMIT_TOKENS = 512
WORDS = [
    "baker",
    "sells",
    "apples",
    "trays",
    "each",
    "week",
    "gives",
    "half",
    "friends",
    "how",
    "many",
    "left",
    "costs",
]


def write_rows(path: Path, rows: int, row_group_rows: int) -> None:
    """Word problems of 20 to 120 words with a ground truth and two further columns."""
    rng = np.random.Generator(np.random.Philox(7))
    prompts = [
        " ".join(str(n % 97) if n % 7 == 0 else WORDS[n % len(WORDS)] for n in rng.integers(0, 10_000, length))
        for length in rng.integers(20, 120, rows)
    ]
    table = pa.table(
        {
            "prompt": prompts,
            "response": [""] * rows,
            "reward": [str(n) for n in range(rows)],
            "source": ["bench"] * rows,
            "level": list(range(rows)),
        }
    )
    pq.write_table(table, path, row_group_size=row_group_rows)


def make_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    sample = pq.ParquetFile(path).read_row_group(0, columns=["prompt"]).column(0).to_pylist()
    backend.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def peer_rows(path: Path, tokenizer: Any, shuffle: bool) -> Iterator[dict[str, Any]]:
    """The same work in the `datasets` library: stream, shuffle by buffer, tokenise in batches, drop over-long rows."""
    from datasets import load_dataset

    stream = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    if shuffle:
        stream = stream.shuffle(seed=0, buffer_size=1024)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"token_ids": tokenizer(batch["prompt"], return_attention_mask=False)["input_ids"]}

    stream = stream.map(encode, batched=True, batch_size=256)
    return iter(stream.filter(lambda row: len(row["token_ids"]) <= PROMPT_LIMIT_TOKENS))


def timed(rows: Callable[[], Iterator[Any]]) -> tuple[int, float, float]:
    """Number of rows, wall seconds and CPU seconds of one whole pass."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(1 for _ in rows())
    return count, time.perf_counter() - wall, time.process_time() - cpu


def compare(
    ours: Callable[[], Iterator[Any]], peer: Callable[[], Iterator[Any]], kept: int, passes: int
) -> dict[str, Any]:
    """Alternating passes; rates and ratios by wall clock and by CPU time."""
    rates: dict[str, dict[str, list[float]]] = {clock: {"grpo": [], "datasets": []} for clock in ("wall", "cpu")}
    for number in range(passes + 1):
        for name, rows in (("grpo", ours), ("datasets", peer)):
            count, wall_seconds, cpu_seconds = timed(rows)
            if count != kept:
                raise SystemExit(f"{name} gave {count} rows, not {kept}: the two did not do the same work")
            if number:  # the first pass warms up
                rates["wall"][name].append(kept / wall_seconds)
                rates["cpu"][name].append(kept / cpu_seconds)
    result: dict[str, Any] = {}
    for clock, by_name in rates.items():
        ratios = [one / other for one, other in zip(by_name["grpo"], by_name["datasets"], strict=True)]
        result[clock] = {
            f"{name}_rows_per_second": [round(rate) for rate in values] for name, values in by_name.items()
        }
        result[clock]["ratio"] = round(statistics.median(ratios), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--row-group-rows", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()

    import datasets

    from grpo_worker.data import DataOptions, PromptDataset, PromptEncoder

    datasets.disable_progress_bars()
    # 5 seconds a pass by default, whatever the number of rows: in a short run it would triple the ratio.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "train.parquet"
        write_rows(path, arguments.rows, arguments.row_group_rows)
        tokenizer = make_tokenizer(path)
        result: dict[str, Any] = {
            "rows": arguments.rows,
            "row_group_rows": arguments.row_group_rows,
            "passes": arguments.passes,
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
            "versions": {"datasets": datasets.__version__, "pyarrow": pa.__version__},
        }
        for shuffle in (False, True):
            ours = PromptDataset(
                [path], DataOptions(shuffle=shuffle), PromptEncoder(tokenizer, max_prompt_tokens=PROMPT_LIMIT_TOKENS)
            )
            scan_start = time.perf_counter()
            kept = ours.scan().kept
            scan_seconds = time.perf_counter() - scan_start
            result["shuffled" if shuffle else "in_order"] = {
                "scan_rows_per_second": round(arguments.rows / scan_seconds),
                **compare(ours.iterate, partial(peer_rows, path, tokenizer, shuffle), kept, arguments.passes),
            }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
