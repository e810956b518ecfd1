"""verl's side: `verl.trainer.main_ppo` with FSDP and vLLM in turn on one GPU, a JSON line a step.

    python -m benchmarks.side_by_side.verl_side MODEL TRAIN.parquet OUT_DIR --steps 4 --tokens 32768 --checkpointing

Writes OUT_DIR/curve.jsonl. Needs verl with all it asks for, flash-attn among it. GRPO without KL, one update a step, token weights of at most 2 for
the mismatch of engine and trainer; the reward is noise. Where it is not ours: verl's loss caps the ratio of negative advantages at 3 (dual clip),
and `ignore_eos` makes each answer as long as it may be.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from transformers import AutoTokenizer

from benchmarks.side_by_side.inputs import add_batch
from grpo_worker.demo.tokenizer import VOCABULARY, build_tokenizer
from grpo_worker.rewards.process import kill_started_with

REWARD = '''"""A reward that no policy can learn: uniform in 0..1, whatever the answer is."""

import random


def compute_score(data_source=None, solution_str=None, ground_truth=None, extra_info=None, **_):
    return random.random()
'''
FIGURES = {  # in our file -> in verl's
    "step_seconds": "timing_s/step",
    "gen": "timing_s/gen",
    "old_log_prob": "timing_s/old_log_prob",
    "update_actor": "timing_s/update_actor",
    "update_weights": "timing_s/update_weights",
    "length": "response_length/mean",
    "mfu": "perf/mfu/actor",
}


def make_model(source: Path, target: Path) -> None:
    """The same weights and tokens, with a chat template that is the message itself and names for the ids that stand for nothing: verl's
    engine may sample only ids below len(tokenizer), which are 66 otherwise."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            (target / file.name).symlink_to(file.resolve())
    build_tokenizer().save_pretrained(target)
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"].update({f"<t{index}>": index for index in range(len(VOCABULARY), size)})
    file.write_text(json.dumps(tokenizer))
    file = target / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 4096, "chat_template": template}))
    (target / "chat_template.jinja").unlink(missing_ok=True)
    if (found := len(AutoTokenizer.from_pretrained(target))) != size:
        sys.exit(f"the tokenizer has {found} tokens, the model {size}")


def make_data(source: Path, target: Path) -> None:
    rows = [
        {
            "data_source": "noise",
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row["reward"]},
            "extra_info": {"index": index},
        }
        for index, row in enumerate(parquet.read_table(source).to_pylist())
    ]
    parquet.write_table(pa.Table.from_pylist(rows), target)


def overrides(options: argparse.Namespace, model: Path, data: Path, reward: Path) -> list[str]:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    found = {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_is_threshold": 2.0,
        "data.train_files": data,
        "data.val_files": data,
        "data.train_batch_size": options.prompts,
        "data.max_prompt_length": options.prompt_tokens,
        "data.max_response_length": options.response_tokens,
        "data.shuffle": False,
        "data.dataloader_num_workers": 2,
        "data.filter_overlong_prompts": False,
        "actor_rollout_ref.hybrid_engine": True,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.model.enable_gradient_checkpointing": options.checkpointing,
        "+actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2",
        f"{actor}.strategy": "fsdp",
        f"{actor}.fsdp_config.model_dtype": "fp32",
        f"{actor}.fsdp_config.dtype": "bfloat16",
        f"{actor}.ppo_mini_batch_size": options.prompts,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": options.tokens,
        f"{actor}.loss_agg_mode": "token-mean",
        f"{actor}.entropy_coeff": 0,
        f"{actor}.use_kl_loss": False,
        f"{actor}.optim.lr": 1e-6,
        f"{actor}.optim.weight_decay": 0.01,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": options.samples,
        f"{rollout}.ignore_eos": True,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.gpu_memory_utilization": options.gpu_memory_utilization,
        f"{rollout}.max_num_seqs": options.prompts * options.samples,
        f"{rollout}.max_num_batched_tokens": 8192,
        f"{rollout}.max_model_len": options.prompt_tokens + options.response_tokens,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.log_prob_use_dynamic_bsz": True,
        f"{rollout}.log_prob_max_token_len_per_gpu": options.tokens,
        "reward.custom_reward_function.path": reward,
        "reward.custom_reward_function.name": "compute_score",
        "trainer.logger": "[console,file]",
        "trainer.default_local_dir": options.out / "checkpoints",
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "trainer.n_gpus_per_node": 1,
        "trainer.nnodes": 1,
        "trainer.total_epochs": 1000,
        "trainer.total_training_steps": options.steps,
        "ray_kwargs.ray_init.num_cpus": os.cpu_count(),
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init._node_ip_address": "127.0.0.1",
        "hydra.run.dir": options.out / "hydra",
    }
    return [f"{name}={value}" for name, value in found.items()] + options.set


def read(line: str) -> dict[str, Any] | None:
    """Of one line of verl's metrics, which prefixes some names by a role; None for a line without a step's times."""
    record = json.loads(line)
    values = record["data"]
    found = {
        ours: value
        for ours, theirs in FIGURES.items()
        for name, value in values.items()
        if name == theirs or name.endswith(f"/{theirs}")
    }
    return {"step": int(record["step"]), **found} if "step_seconds" in found else None


def end(marker: str) -> None:
    """What the run has started and left: Ray's processes are in sessions of their own, and known by their environment."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        kill_started_with({marker}, number)
        time.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    add_batch(parser, 32, 512)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro-batch")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further settings of verl")
    options = parser.parse_args()
    options.out = out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model, data, reward, metrics = out / "model", out / "train.parquet", out / "reward.py", out / "metrics.jsonl"
    make_model(options.model.resolve(), model)
    make_data(options.data, data)
    reward.write_text(REWARD)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "VERL_FILE_LOGGER_PATH": str(metrics)}
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(options, model, data, reward)]
    process = subprocess.Popen(command, env=os.environ | environment, cwd=out)
    told = 0
    try:
        with (out / "curve.jsonl").open("w") as curve:
            while (code := process.poll()) is None or told < len(_whole_lines(metrics)):
                for line in _whole_lines(metrics)[told:]:
                    told += 1
                    if (step := read(line)) is not None:
                        curve.write(json.dumps(step) + "\n")
                        curve.flush()
                time.sleep(0.1)
    finally:
        end(f"VERL_FILE_LOGGER_PATH={metrics}")
    sys.exit(code)


def _whole_lines(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1] if file.exists() else []


if __name__ == "__main__":
    main()
