"""`grpo data gsm8k` and `grpo data reasoning-gym`: problems as Parquet that a job reads."""

import argparse
from pathlib import Path
from typing import Any

from grpo_worker.config import parse_yaml
from grpo_worker.errors import UsageError


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    kinds = commands.add_parser("data", help="make training data").add_subparsers(metavar="KIND", required=True)
    gsm8k = kinds.add_parser(
        "gsm8k",
        help="convert GSM8K's own files",
        description="Question/answer files (Parquet or JSON Lines) to prompt, response, reward.",
    )
    gsm8k.add_argument("inputs", nargs="+", type=Path, help="GSM8K's Parquet or JSON Lines files")
    gsm8k.add_argument(
        "--no-instruction", action="store_true", help="do not append the instruction to end with `#### answer`"
    )
    gsm8k.set_defaults(function=_gsm8k)
    gym = kinds.add_parser(
        "reasoning-gym",
        help="make procedural problems",
        description="Problems of a reasoning-gym task; score them with reward.function: reasoningGym.",
    )
    gym.add_argument("--task", required=True, help="for example chain_sum, gsm_symbolic, basic_arithmetic")
    gym.add_argument("--size", type=int, required=True, help="problems")
    gym.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the task, e.g. max_digits=2",
    )
    gym.set_defaults(function=_reasoning_gym)
    for parser in (gsm8k, gym):
        parser.add_argument(
            "--split", choices=("train", "test"), default="train", help="test keeps the answer in `response`"
        )
        parser.add_argument(
            "--seed",
            type=int,
            default=1,
            help="of the problems and of their order; another one for test than for train",
        )
        parser.add_argument("--output", "-o", type=Path, required=True, help="the Parquet file to write")
        parser.add_argument("--overwrite", action="store_true")


def _gsm8k(options: argparse.Namespace) -> None:
    from grpo_worker.data.gsm8k import INSTRUCTION, convert_gsm8k

    instruction = None if options.no_instruction else INSTRUCTION
    written = convert_gsm8k(
        options.inputs, options.output, options.split, instruction, options.seed, overwrite=options.overwrite
    )
    print(f"{written.output}: {written.rows} rows")


def _reasoning_gym(options: argparse.Namespace) -> None:
    from grpo_worker.data.reasoning_gym import make_reasoning_gym

    config: dict[str, Any] = {}
    for setting in options.settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: expected NAME=VALUE")
        config[name] = parse_yaml(value, f"--set {name}")
    written = make_reasoning_gym(
        options.task, options.size, options.seed, options.output, config, options.split, overwrite=options.overwrite
    )
    print(f"{written.output}: {written.rows} rows")
