"""TRL's side: one `GRPOTrainer` run with vLLM colocated on the same GPU, its curve as JSON lines.

    python -m benchmarks.learning_curves.trl_side MODEL TRAIN.parquet OUT_DIR --algorithm DrGRPO --seed 1 --lr 1e-5 --steps 60

Writes OUT_DIR/curve.jsonl and the trained model in OUT_DIR/model. Needs trl and vllm. Where our presets and TRL's defaults differ, TRL is set to
what the preset says; the mismatch of engine and trainer is corrected alike (token-level weights, capped at 2).
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_worker.rewards.gsm8k import extract_number

LOSSES: dict[str, dict[str, Any]] = {
    "GRPO": {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.04},
    "DrGRPO": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
}


def right_number(completions: list[Any], truth: list[str], **_: Any) -> list[float]:
    """1 where the last number of the answer is the right one."""
    return [
        float(extract_number(completion[0]["content"]) == extract_number(gold))
        for completion, gold in zip(completions, truth, strict=True)
    ]


class Curve(TrainerCallback):
    """One line a step: reward, mean response length, seconds since training began."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("w")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "reward" in logs:
            point = {
                "step": state.global_step,
                "reward": logs["reward"],
                "length": logs["completions/mean_length"],
                "seconds": time.perf_counter() - self.started,
            }
            self.file.write(json.dumps(point) + "\n")
            self.file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--algorithm", choices=LOSSES, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.1)
    options = parser.parse_args()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**alone, "MASTER_PORT": str(29500 + os.getpid() % 1000)})
    options.out.mkdir(parents=True, exist_ok=True)
    rows = parquet.read_table(options.data).to_pylist()
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "truth": row["reward"]} for row in rows]
    )
    config = GRPOConfig(
        output_dir=str(options.out / "trl"),
        per_device_train_batch_size=128,
        gradient_accumulation_steps=4,  # 512 samples an update
        num_generations=8,
        max_completion_length=64,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=True,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=options.gpu_memory_utilization,
        vllm_max_model_length=192,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
        seed=options.seed,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **LOSSES[options.algorithm],
    )
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=right_number,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[Curve(options.out / "curve.jsonl")],
    )
    trainer.train()
    trainer.save_model(str(options.out / "model"))


if __name__ == "__main__":
    main()
