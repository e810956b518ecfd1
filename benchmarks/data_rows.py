"""How long a job's data takes at its start, the first time and the next, and what memory, beside plain `datasets`.

One Parquet file of some GiB in row groups of more than 2 GiB of text, the most that one Arrow array of strings can hold. Each part is a process of
its own: ours opens the file, tokenises every prompt, and then yields prompts in the order of an epoch; the peer is `load_dataset` and a `map` that
tokenises, as its users write it. Memory is what a process has for itself (RssAnon): the pages of mapped files are the system's to take back.
The tokenizer is a byte-level BPE trained here, so nothing is downloaded. Prints one JSON object.

    python -m benchmarks.data_rows --gib 5
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.peak import Peak

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


def write_rows(path: Path, gib: float, group_gib: float) -> int:
    """Word problems of 20 to 120 words, a ground truth, and a solution of 4,000 characters. Returns the number of rows."""
    rng = np.random.Generator(np.random.Philox(7))
    pool = [" ".join(WORDS[n % len(WORDS)] for n in rng.integers(0, 10_000, 600))[:4000] for _ in range(256)]
    rows, group = int(gib * 2**30 / 4000), int(group_gib * 2**30 / 4000)
    columns = {name: pa.large_string() for name in ("prompt", "reward", "solution")}
    with pq.ParquetWriter(path, pa.schema(columns), use_dictionary=False, compression="none") as writer:
        for start in range(0, rows, group):
            numbers = range(start, min(start + group, rows))
            prompts = [f"{n} {pool[n % 256][: 100 + n % 600]}" for n in numbers]
            table = {
                "prompt": prompts,
                "reward": [str(n) for n in numbers],
                "solution": [pool[n * 7 % 256] for n in numbers],
            }
            writer.write_table(pa.table(table, pa.schema(columns)), row_group_size=group)
    return rows


def make_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    (sample,) = itertools.islice(pq.ParquetFile(path).iter_batches(4096, columns=["prompt"]), 1)
    backend.train_from_iterator(sample.column(0).to_pylist(), trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def own_memory_mib() -> float:
    """What this process has for itself."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def ours(path: Path, tokenizer: Any, prompts: int) -> dict[str, float]:
    from grpo_worker.data import DataOptions, PromptDataset, PromptEncoder, open_files

    started = time.perf_counter()
    options = DataOptions()
    data = PromptDataset(open_files([path], options), options, PromptEncoder(tokenizer, PROMPT_LIMIT_TOKENS))
    kept = data.scan().kept
    opened = time.perf_counter()
    for _ in itertools.islice(data.iterate(), prompts):
        pass
    return {
        "rows": kept,
        "start_seconds": opened - started,
        "prompts_per_second": prompts / (time.perf_counter() - opened),
    }


def peer(path: Path, tokenizer: Any) -> dict[str, float]:
    import datasets

    datasets.disable_progress_bars()

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"token_ids": tokenizer(batch["prompt"], return_attention_mask=False)["input_ids"]}

    started = time.perf_counter()
    data = datasets.load_dataset("parquet", data_files=str(path), split="train").map(encode, batched=True)
    return {"rows": data.num_rows, "start_seconds": time.perf_counter() - started}


def part(name: str, path: Path, prompts: int) -> None:
    """In a process of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent)
    with Peak(own_memory_mib, 0.02) as memory:
        found = peer(path, tokenizer) if name == "datasets" else ours(path, tokenizer, prompts)
    print(
        json.dumps(
            {key: round(value, 2) for key, value in found.items()} | {"own_memory_mib": round(memory.value or 0.0)}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=5.0)
    parser.add_argument("--group-gib", type=float, default=2.5, help="of a row group")
    parser.add_argument("--prompts", type=int, default=20_000, help="taken in the order of an epoch")
    parser.add_argument("--directory", type=Path, help="where the file and the caches go: some 4 times --gib")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part(arguments.part[0], Path(arguments.part[1]), arguments.prompts)
        return
    import datasets

    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        path = Path(directory) / "train.parquet"
        rows = write_rows(path, arguments.gib, arguments.group_gib)
        make_tokenizer(path).save_pretrained(directory)
        result: dict[str, Any] = {
            "file_gib": round(path.stat().st_size / 2**30, 2),
            "row_groups": pq.ParquetFile(path).num_row_groups,
            "rows": rows,
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
            "versions": {"datasets": datasets.__version__, "pyarrow": pa.__version__},
        }
        for name in ("first", "next", "datasets"):
            cache = {"HF_DATASETS_CACHE": f"{directory}/{'theirs' if name == 'datasets' else 'ours'}"}
            command = [sys.executable, "-m", "benchmarks.data_rows", "--prompts", str(arguments.prompts)]
            done = subprocess.run(
                [*command, "--part", name, str(path)],
                env=os.environ | cache,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            lines = done.stdout.strip().splitlines()
            result[name] = json.loads(lines[-1]) if done.returncode == 0 else {"exit": done.returncode}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
