"""vLLM alone: the same requests as a step's, offline and in one process, a JSON line a round. What our engine's generation is compared with.

python -m benchmarks.side_by_side.vllm_alone MODEL TRAIN.parquet OUT_DIR --rounds 4 [--no-log-probs]
"""

import argparse
import json
import os
import time
from pathlib import Path

import pyarrow.parquet as parquet
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--prompts", type=int, default=64, help="a round")
    parser.add_argument("--samples", type=int, default=8, help="a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--no-log-probs", action="store_true")
    parser.add_argument("--plain", action="store_true", help="prompts are text, not a chat")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3)
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = []
    for row in parquet.read_table(options.data).to_pylist():
        text, chat = row["prompt"], [{"role": "user", "content": row["prompt"]}]
        if not options.plain:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append({"prompt_token_ids": tokenizer(text, add_special_tokens=options.plain)["input_ids"]})
    llm = LLM(
        model=options.model,
        skip_tokenizer_init=True,
        max_num_seqs=options.prompts * options.samples,
        max_model_len=options.prompt_tokens + options.response_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        logprobs_mode="raw_logprobs",
    )
    sampling = SamplingParams(
        temperature=1.0,
        max_tokens=options.response_tokens,
        logprobs=None if options.no_log_probs else 0,
        flat_logprobs=not options.no_log_probs,
        detokenize=False,
        stop_token_ids=[tokenizer.eos_token_id],
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    with (options.out / "curve.jsonl").open("w") as file:
        for number in range(1, options.rounds + 1):
            fresh = [prompts[(number * options.prompts + i) % len(prompts)] for i in range(options.prompts)]
            started = time.perf_counter()
            outputs = llm.generate(fresh * options.samples, sampling, use_tqdm=False)
            seconds = time.perf_counter() - started
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            point = {"step": number, "step_seconds": seconds, "length": tokens / len(outputs)}
            file.write(json.dumps(point) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
