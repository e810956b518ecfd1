"""`grpo generate` and `grpo demo`: look at a trained model, make the demo's model and data."""

import argparse
from pathlib import Path

from grpo_worker.errors import UsageError


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    generate = commands.add_parser(
        "generate",
        help="answer prompts with a checkpoint",
        description="Load a checkpoint's actor/ in vLLM and answer prompts.",
    )
    generate.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint, a directory of checkpoints, or a model directory"
    )
    generate.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    generate.add_argument("--prompts-file", type=Path, help="a file with one prompt a line")
    generate.add_argument("--temperature", type=float, default=0.3)
    generate.add_argument("--top-p", type=float, default=0.9)
    generate.add_argument("--max-tokens", type=int, default=256)
    generate.add_argument("--n", type=int, default=1, help="answers a prompt")
    generate.add_argument("--seed", type=int, default=1)
    generate.add_argument("--greedy", action="store_true", help="the most likely answer (temperature 0)")
    generate.set_defaults(function=_generate)
    demo = commands.add_parser("demo", help="make the demo's model and data").add_subparsers(
        metavar="COMMAND", required=True
    )
    prepare = demo.add_parser("prepare", help="write a tiny model and arithmetic problems")
    prepare.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    prepare.add_argument("--seed", type=int, default=1)
    prepare.set_defaults(function=_prepare)


def _generate(options: argparse.Namespace) -> None:
    from grpo_worker.generate import generate

    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            prompts += [line for line in options.prompts_file.read_text().splitlines() if line]
        except OSError as error:
            raise UsageError(f"--prompts-file {options.prompts_file}: {error.strerror}") from error
    if not prompts:
        raise UsageError("grpo generate: no prompt. Give --prompt TEXT or --prompts-file FILE.")
    answers = generate(
        options.checkpoint,
        prompts,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=1.0 if options.greedy else options.top_p,
        max_tokens=options.max_tokens,
        n=options.n,
        seed=options.seed,
    )
    for prompt, texts in zip(prompts, answers, strict=True):
        for text in texts:
            print(f"{prompt!r} -> {text!r}")


def _prepare(options: argparse.Namespace) -> None:
    from grpo_worker.demo.prepare import prepare_demo

    paths = prepare_demo(options.directory, options.seed)
    print(f"model: {paths.model}\ntrain: {paths.train}\ntest: {paths.test}")
