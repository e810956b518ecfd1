"""The pure parts of the comparison with TRL and verl, and a row that fails."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from benchmarks.side_by_side import verl_side
from benchmarks.side_by_side.__main__ import PLANS, commands, measure, ratios, table
from benchmarks.side_by_side.inputs import make
from transformers import AutoTokenizer

from grpo_worker.demo.tokenizer import build_tokenizer


def row(step: float, **others: float) -> dict:
    figures = {"step_seconds": step, **others}
    return {name: {"median": value, "least": value, "most": value} for name, value in figures.items()}


ROWS = {
    "ours": row(6.0, gen=4.0, update_actor=1.5),
    "ours/pass": row(7.5, gen=4.0),
    "trl/16": row(30.0),
    "trl/32": row(21.0),
    "trl/64": {"failure": "exit 1: out of memory", "step_seconds": {"median": 1.0, "least": 1.0, "most": 1.0}},
    "verl/checkpointing": row(24.0, gen=15.0),
    "verl/plain": row(27.0),
    "vllm/log-probs": row(3.0),
    "engine/log-probs": row(3.2),
    "engine/no-log-probs": row(2.5),
}


def test_ratios_are_with_the_fastest_row_that_did_not_fail():
    assert ratios(ROWS) == {
        "vLLM alone over our engine alone, log-probs": 0.9375,
        "TRL's step over that of ours": 3.5,
        "verl's step over that of ours": 4.0,
        "vLLM alone over generation of ours": 0.75,
        "TRL's step over that of ours/pass": 2.8,
        "verl's step over that of ours/pass": 3.2,
        "vLLM alone over generation of ours/pass": 0.75,
    }


def test_a_row_that_failed_says_why_in_the_table():
    lines = table(ROWS).splitlines()
    assert lines[2].startswith("| ours | 6.00 (6.00 to 6.00) |")
    assert "| trl/64 | exit 1: out of memory |" in lines[6]


def test_both_sides_get_the_same_batch_and_lengths():
    plan = PLANS["0.6b"]
    found = commands(plan, 5, Path("m"), Path("d"), Path("rows"), {"pass": ["--set", "a=b"]})
    assert found.keys() == {
        "ours",
        "ours/pass",
        "trl/16",
        "trl/32",
        "trl/64",
        "verl/checkpointing",
        "verl/plain",
        "vllm/log-probs",
        "vllm/no-log-probs",
        "engine/log-probs",
        "engine/no-log-probs",
    }
    assert found["ours/pass"] == [part.replace("rows/ours/run", "rows/ours/pass/run") for part in found["ours"]] + [
        "--set",
        "a=b",
    ]
    for name, command in found.items():
        if not name.startswith("ours"):
            assert command[command.index("--response-tokens") + 1] == "512"
            assert command[command.index("--prompts") + 1] == "64"
    assert {"data.maxResponseLength=512", "data.trainBatchSize=64", "rollout.n=8"} < set(found["ours"])


def test_verls_figures_are_found_below_the_role_that_it_prefixes_them_with():
    times = {
        "timing_s/step": 31.5,
        "timing_s/gen": 17.0,
        "actor_rollout_ref/perf/mfu/actor": 0.15,
        "training/global_step": 2,
    }
    found = verl_side.read(json.dumps({"step": 2, "data": times}))
    assert found == {"step": 2, "step_seconds": 31.5, "gen": 17.0, "mfu": 0.15}
    assert verl_side.read(json.dumps({"step": 0, "data": {"val-core/noise/acc": 0.5}})) is None


def test_verls_engine_may_sample_every_id_of_the_model(tmp_path):
    make(tmp_path / "inputs", "tiny")
    verl_side.make_model(tmp_path / "inputs" / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "48+35="}], tokenize=False, add_generation_prompt=True
    )
    assert len(tokenizer) == json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    assert chat == "48+35="
    assert tokenizer(chat)["input_ids"] == build_tokenizer()("48+35=")["input_ids"]
    verl_side.make_data(tmp_path / "inputs" / "train.parquet", tmp_path / "train.parquet")
    row = parquet.read_table(tmp_path / "train.parquet").to_pylist()[0]
    assert row["prompt"][0]["role"] == "user" and row["reward_model"]["style"] == "rule"


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise SystemExit('no GPU')", "exit 1: no GPU"), ("import time; time.sleep(60)", "not done after 1 s")],
)
def test_a_row_that_cannot_run_is_a_result(tmp_path, code, said):
    result = measure([sys.executable, "-c", code], tmp_path, 1.0)
    assert result["failure"] == said
    assert result["steps"] == 0
