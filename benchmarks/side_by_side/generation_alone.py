"""Generation alone: the requests of a step, again and again in one process, a JSON line a round.

    python -m benchmarks.side_by_side.generation_alone vllm MODEL TRAIN.parquet OUT_DIR --rounds 4 [--no-log-probs]
    python -m benchmarks.side_by_side.generation_alone engine MODEL TRAIN.parquet OUT_DIR --rounds 4 --profile

`vllm` is vLLM's own offline `LLM`; `engine` ours as the rollout server drives it, without a run around it. So what our way of driving vLLM
costs is told apart from what a run does. With --profile OUT_DIR/profile.txt has the Python functions of the engine's thread in one more round.
"""

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from transformers import AutoTokenizer

from benchmarks.side_by_side.inputs import add_batch
from grpo_worker.config.actor import Model
from grpo_worker.config.rollout import Rollout
from grpo_worker.protocol.messages import Array, GenerateRequest, GroupResult, PromptRequest, Sampling
from grpo_worker.rollout.engine import RolloutEngine
from grpo_worker.rollout.generation import generate
from grpo_worker.rollout.options import EngineOptions

Round = Callable[[list[list[int]]], int]  # tokens of prompts in, number of generated tokens out


def kv_cache(options: argparse.Namespace) -> dict[str, Any]:
    """Engines that start beside one another would each take what the others allocate meanwhile for their own."""
    return {"kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30)} if options.kv_cache_gib else {}


def vllm_alone(options: argparse.Namespace, stop: int) -> Round:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        model=options.model,
        skip_tokenizer_init=True,
        max_num_seqs=options.prompts * options.samples,
        max_model_len=options.prompt_tokens + options.response_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        logprobs_mode="raw_logprobs",
        **kv_cache(options),
    )
    sampling = SamplingParams(
        temperature=1.0,
        max_tokens=options.response_tokens,
        logprobs=None if options.no_log_probs else 0,
        flat_logprobs=not options.no_log_probs,
        detokenize=False,
        stop_token_ids=[stop],
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    def generate(prompts: list[list[int]]) -> int:
        inputs: list[Any] = [{"prompt_token_ids": ids} for ids in prompts for _ in range(options.samples)]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


class OurEngine:
    """The engine without its HTTP server."""

    def __init__(self, options: argparse.Namespace, stop: int) -> None:
        section = Rollout.model_validate(
            {
                "maxNumSeqs": options.prompts * options.samples,
                "gpuMemoryUtilization": options.gpu_memory_utilization,
                "engineArgs": kv_cache(options),
            }
        )
        length = options.prompt_tokens + options.response_tokens
        self.log_probs = not options.no_log_probs
        self.sampling = Sampling(
            n=options.samples,
            max_tokens=options.response_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            stop_token_ids=[stop],
        )
        self.loop = asyncio.new_event_loop()
        self.engine = RolloutEngine(EngineOptions(Model(path=options.model), section, length))
        self.loop.run_until_complete(self.engine.start())

    def __call__(self, prompts: list[list[int]]) -> int:
        return self.loop.run_until_complete(self._tokens(prompts))

    async def _tokens(self, prompts: list[list[int]]) -> int:
        listed = [
            PromptRequest(id=str(i), token_ids=Array.of(ids, "int32"), log_probs=self.log_probs)
            for i, ids in enumerate(prompts)
        ]
        request = GenerateRequest(request_id="round", prompts=listed, sampling=self.sampling, deadline_seconds=600.0)
        results = [message async for message in generate(self.engine, request) if isinstance(message, GroupResult)]
        failures = [result.error for result in results if result.error]
        assert not failures, failures[0]
        return sum(len(sample.token_ids.numpy()) for result in results for sample in result.samples)

    def profiled(self, prompts: list[list[int]], table: Path) -> None:
        profile = cProfile.Profile()

        async def between() -> None:
            await self.engine._thread.between_steps(profile.enable)
            await self._tokens(prompts)
            await self.engine._thread.between_steps(profile.disable)

        self.loop.run_until_complete(between())
        with table.open("w") as file:
            pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["vllm", "engine"])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    add_batch(parser, 128, 64)
    parser.add_argument("--no-log-probs", action="store_true")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3)
    parser.add_argument("--kv-cache-gib", type=float, help="in place of what is left of that share")
    parser.add_argument("--profile", action="store_true", help="of our engine only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = []
    for row in parquet.read_table(options.data).to_pylist():
        text, chat = row["prompt"], [{"role": "user", "content": row["prompt"]}]
        if not options.plain:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=options.plain)["input_ids"])
    stop = tokenizer.eos_token_id
    side = OurEngine(options, stop) if options.side == "engine" else vllm_alone(options, stop)
    with (options.out / "curve.jsonl").open("w") as file:
        for number in range(1, options.rounds + 1):
            chosen = [prompts[(number * options.prompts + i) % len(prompts)] for i in range(options.prompts)]
            started = time.perf_counter()
            tokens = side(chosen)
            seconds = time.perf_counter() - started
            point = {"step": number, "step_seconds": seconds, "length": tokens / options.prompts / options.samples}
            file.write(json.dumps(point) + "\n")
            file.flush()
    if options.profile and isinstance(side, OurEngine):
        side.profiled(chosen, options.out / "profile.txt")
    os._exit(0)  # not by way of vLLM's threads


if __name__ == "__main__":
    main()
