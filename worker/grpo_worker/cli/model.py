"""`grpo generate`, `grpo eval`: look at a trained model."""

import argparse
import json
from pathlib import Path

from grpo_worker.cli.job import add_document


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    answer = commands.add_parser(
        "generate",
        help="answer prompts with a checkpoint",
        description="Load a checkpoint's actor/ in vLLM and answer prompts.",
    )
    answer.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint, a directory of checkpoints, a run, or a model"
    )
    answer.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    answer.add_argument(
        "--prompts-file", type=Path, help="a file with one prompt a line, or .jsonl with a key 'prompt'"
    )
    answer.add_argument("--temperature", type=float, default=0.3, help="default 0.3; 0 is greedy")
    answer.add_argument("--top-p", type=float, default=0.9, help="default 0.9")
    answer.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    answer.add_argument(
        "--max-tokens", type=int, help="longest completion in tokens, default 256, or half of a shorter context"
    )
    answer.add_argument("--n", type=int, default=1, help="completions of each prompt, default 1")
    answer.add_argument("--seed", type=int, default=1, help="default 1")
    answer.add_argument("--system-prompt", help="as data.systemPrompt of the training")
    answer.add_argument(
        "--no-chat-template", action="store_true", help="as data.chatTemplate.apply: never of the training"
    )
    answer.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model, default 1")
    answer.add_argument("--gpu-memory-utilization", type=float, default=0.6, help="share of GPU memory, default 0.6")
    answer.add_argument("--timeout-seconds", type=float, default=600.0, help="limit of the generation, default 600")
    answer.add_argument("--json", action="store_true", help="print one JSON object a prompt: prompt, completions")
    answer.set_defaults(function=_generate)
    measure = commands.add_parser(
        "eval",
        help="validate a checkpoint without training",
        description="The document's validation of a checkpoint: its prompts, sampling (rollout.validation) and graders, one engine.",
    )
    add_document(measure)
    measure.add_argument(
        "--checkpoint",
        type=Path,
        help="a checkpoint, a directory of checkpoints, a run, or a model; default model.path",
    )
    measure.add_argument("--data", nargs="+", metavar="FILE", help="in place of data.validationFiles")
    measure.add_argument("--dump", type=Path, metavar="DIR", help="also write the greedy answers, as Parquet")
    measure.add_argument("--json", action="store_true", help="print one JSON object")
    measure.set_defaults(function=_eval)


def _eval(options: argparse.Namespace) -> None:
    from grpo_worker.config import load_job
    from grpo_worker.evaluate import evaluate
    from grpo_worker.generate import find_model
    from grpo_worker.model_files import resolve_model

    data = [f"data.validationFiles={json.dumps(options.data)}"] if options.data else []
    spec = load_job(options.file, [*options.overrides, *data]).spec
    model = (
        find_model(options.checkpoint) if options.checkpoint else resolve_model(spec.model.path, spec.model.revision)
    )
    metrics = evaluate(spec, model, options.dump)
    if options.json:
        print(json.dumps(metrics))
        return
    for name, value in metrics.items():
        print(f"{name:40} {value:.4g}")


def _generate(options: argparse.Namespace) -> None:
    from grpo_worker.generate import generate, read_prompts

    prompts = [*options.prompt, *(read_prompts(options.prompts_file) if options.prompts_file else [])]
    completions = generate(
        options.checkpoint,
        prompts,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        n=options.n,
        seed=options.seed,
        system_prompt=options.system_prompt,
        chat_template=not options.no_chat_template,
        tensor_parallel_size=options.tensor_parallel_size,
        gpu_memory_utilization=options.gpu_memory_utilization,
        timeout_seconds=options.timeout_seconds,
    )
    for prompt, answers in zip(prompts, completions, strict=True):
        if options.json:
            print(json.dumps({"prompt": prompt, "completions": answers}, ensure_ascii=False))
            continue
        for answer in answers:
            print(f"--- {prompt}\n{answer}" if "\n" in prompt + answer else f"{prompt} -> {answer}")
