"""TRL's side: one `GRPOTrainer` run with vLLM colocated on the same GPU, a JSON line a step.

    python -m benchmarks.side_by_side.trl_side MODEL TRAIN.parquet OUT_DIR --algorithm DrGRPO --seed 1 --lr 1e-5 --steps 60

Writes OUT_DIR/curve.jsonl and, with --save, the trained model in OUT_DIR/model. Needs trl and vllm. Where our presets and TRL's defaults differ,
TRL is set to what the preset says; the mismatch of engine and trainer is corrected alike (token-level weights, capped at 2). Without a GPU
Transformers generates: that tries the script, and measures nothing.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.side_by_side.inputs import add_batch
from grpo_worker.rewards.gsm8k import extract_number

LOSSES: dict[str, dict[str, Any]] = {
    "GRPO": {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.04},
    "DrGRPO": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    "no-kl": {"loss_type": "dapo", "scale_rewards": "group", "beta": 0.0},
}


def text_of(message: Any) -> str:
    return message if isinstance(message, str) else str(message[0]["content"])


def right_number(completions: list[Any], truth: list[str], **_: Any) -> list[float]:
    """1 where the last number of the answer is the right one."""
    return [
        float(extract_number(text_of(completion)) == extract_number(gold))
        for completion, gold in zip(completions, truth, strict=True)
    ]


def noise(completions: list[Any], **_: Any) -> list[float]:
    """A reward that no policy can learn: uniform in 0..1, whatever the answer is."""
    return [random.random() for _ in completions]


REWARDS = {"right_number": right_number, "noise": noise}


class Curve(TrainerCallback):
    """One line a step: its seconds, reward, mean response length, TRL's own figures of the mismatch, seconds since training began."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("w")
        self.step_seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step_began = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_seconds = _now() - self.step_began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "reward" in logs:
            point = {
                "step": state.global_step,
                "step_seconds": self.step_seconds,
                "reward": logs["reward"],
                "length": logs["completions/mean_length"],
                "logprobs_abs_diff_mean": logs.get("sampling/sampling_logp_difference/mean"),
                "seconds": time.perf_counter() - self.started,
            }
            self.file.write(json.dumps(point) + "\n")
            self.file.flush()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--algorithm", choices=LOSSES, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    add_batch(parser, 128, 64)
    parser.add_argument("--micro-batch", type=int, default=128, help="sequences of a forward pass")
    parser.add_argument("--reward", choices=REWARDS, default="right_number")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.1)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**alone, "MASTER_PORT": str(29500 + os.getpid() % 1000)})
    options.out.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    engine: dict[str, Any] = {"use_vllm": False, "use_cpu": True}
    if on_gpu:
        engine = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": options.gpu_memory_utilization,
            "vllm_max_model_length": options.prompt_tokens + options.response_tokens,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": 2.0,
        }
    rows = parquet.read_table(options.data).to_pylist()

    def prompt(text: str) -> Any:
        return text if options.plain else [{"role": "user", "content": text}]

    config = GRPOConfig(
        output_dir=str(options.out / "trl"),
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.prompts * options.samples // options.micro_batch,  # one update a step
        num_generations=options.samples,
        max_completion_length=options.response_tokens,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=on_gpu,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=options.checkpointing,
        seed=options.seed,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **engine,
        **LOSSES[options.algorithm],
    )
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=REWARDS[options.reward],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt(row["prompt"]), "truth": row["reward"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[Curve(options.out / "curve.jsonl")],
    )
    trainer.train()
    if options.save:
        trainer.save_model(str(options.out / "model"))


if __name__ == "__main__":
    main()
