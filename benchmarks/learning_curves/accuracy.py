"""Greedy accuracy of model directories on the held-out sums, by plain transformers: one yardstick for both sides.

python -m benchmarks.learning_curves.accuracy TEST.parquet MODEL_DIR [MODEL_DIR ...]      one JSON line a model
"""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_worker.rewards.gsm8k import extract_number

BATCH = 128
MAX_NEW_TOKENS = 64


@torch.inference_mode()
def greedy(directory: Path, test: Path) -> dict[str, float]:
    """Share of right last numbers, and mean answer length in tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.to(device).eval()
    rows = parquet.read_table(test).to_pylist()
    right, tokens = 0, 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        chats = [[{"role": "user", "content": row["prompt"]}] for row in part]
        texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        tokens += int((answers != tokenizer.pad_token_id).sum())
        for row, ids in zip(part, answers, strict=True):
            answer = extract_number(tokenizer.decode(ids, skip_special_tokens=True))
            right += answer == extract_number(row["reward"])
    return {"accuracy": right / len(rows), "length": tokens / len(rows)}


def main() -> None:
    test, *directories = map(Path, sys.argv[1:])
    for directory in directories:
        print(json.dumps({"model": str(directory), **greedy(directory, test)}), flush=True)


if __name__ == "__main__":
    main()
