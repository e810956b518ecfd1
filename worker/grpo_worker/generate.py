"""`grpo generate`: ask a checkpoint, through the engine and the prompt encoding that the training used.

Invariant: weights are loaded only after their checkpoint's manifest was verified, and a prompt that does not fit is refused, never cut.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_worker.checkpoint.layout import ACTOR_DIRECTORY, MANIFEST_FILE, CheckpointName, latest, list_checkpoints
from grpo_worker.checkpoint.manifest import verify
from grpo_worker.checkpoint.resume import newest_first
from grpo_worker.errors import DataError, RetryableError, UsageError

if TYPE_CHECKING:
    from grpo_worker.data.tokenizer import TokenizerInfo
    from grpo_worker.protocol.messages import GenerateRequest

DEFAULT_MAX_TOKENS = 256
CHECKPOINTS_DIRECTORY = "checkpoints"
# A context for models whose config.json names none.
DEFAULT_CONTEXT_TOKENS = 4096


def find_model(path: Path) -> Path:
    """The model directory that `path` stands for: a model, a checkpoint (its `actor/`), a checkpoints root (its `latest`) or a run.

    Raises:
        UsageError: none of these. CheckpointDamagedError: the checkpoint does not match its manifest.
    """
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise UsageError(
            f"--checkpoint {path}: {kind}. Name a checkpoint, a directory of checkpoints or a model directory."
        )
    if (path / "config.json").is_file():
        if path.resolve().name == ACTOR_DIRECTORY and (path.resolve().parent / MANIFEST_FILE).is_file():
            verify(path.resolve().parent, below=ACTOR_DIRECTORY)
        return path
    if (path / MANIFEST_FILE).is_file() or CheckpointName.parse(path.resolve().name):
        verify(path, below=ACTOR_DIRECTORY)
        return path / ACTOR_DIRECTORY
    for root in (path, path / CHECKPOINTS_DIRECTORY):
        if list_checkpoints(root):
            return find_model(latest(root) or newest_first(root)[0])
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    raise UsageError(
        f"--checkpoint {path}: holds neither a model (config.json) nor checkpoints (epoch_*_step_*). It holds {held}. "
        "Name a checkpoint, a directory of checkpoints or a model directory."
    )


def generate(
    checkpoint: Path,
    prompts: Sequence[str],
    *,
    temperature: float = 0.3,
    top_p: float = 0.9,
    max_tokens: int | None = None,
    n: int = 1,
    seed: int = 1,
    system_prompt: str | None = None,
    chat_template: bool = True,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.6,
    timeout_seconds: float = 600.0,
) -> list[list[str]]:
    """`n` completions of each prompt, in order; a function of the arguments where the engine is deterministic (on CPU).

    Args:
        temperature: 0 is greedy.
        max_tokens: longest completion; prompt and completion together must fit the model's context. None is 256, or half of a shorter context.
        system_prompt, chat_template: as data.systemPrompt and data.chatTemplate of the training.
        timeout_seconds: limit of the generation, after the engine has started.

    Raises:
        UsageError: an argument out of range, or a prompt that does not fit. DataError: no usable model or tokenizer.
        CheckpointDamagedError: the manifest does not match. RetryableError: not done in time.
    """
    check_sampling(temperature, top_p, DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens, n, seed)
    if not prompts:
        raise UsageError("no prompt: give --prompt or --prompts-file.")
    model = find_model(Path(checkpoint))

    from grpo_worker.config.actor import Model
    from grpo_worker.config.rollout import Rollout
    from grpo_worker.data.tokenizer import load_tokenizer
    from grpo_worker.protocol.messages import Array, GenerateRequest, PromptRequest, Sampling
    from grpo_worker.rollout.options import EngineOptions

    info = load_tokenizer(model)
    context_tokens = _context_tokens(model)
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, context_tokens // 2))
    token_ids = encode_prompts(info, prompts, context_tokens - max_tokens, max_tokens, system_prompt, chat_template)
    request = GenerateRequest(
        request_id="generate",
        prompts=[
            PromptRequest(id=str(index), token_ids=Array.of(ids, "int32"), seed=seed + index, log_probs=False)
            for index, ids in enumerate(token_ids)
        ],
        sampling=Sampling(
            n=n,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p if temperature > 0 else 1.0,
            top_k=-1,
            stop_token_ids=list(info.eos_ids),
        ),
        deadline_seconds=timeout_seconds,
    )
    rollout = Rollout().model_copy(
        update={
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "seed": seed,
        }
    )
    options = EngineOptions(Model(path=str(model)), rollout, max_model_len=max(map(len, token_ids)) + max_tokens)
    completions = asyncio.run(_run(options, request))
    return [
        [str(info.tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions[str(index)]]
        for index in range(len(prompts))
    ]


def check_sampling(temperature: float, top_p: float, max_tokens: int, n: int, seed: int) -> None:
    """Raises UsageError with the option to change."""
    if temperature < 0:
        raise UsageError(f"--temperature {temperature} is negative. Use 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is outside (0, 1]. Use 1 for all tokens.")
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} leaves nothing to generate. Use 1 or more.")
    if n < 1:
        raise UsageError(f"--n {n}: use 1 or more.")
    if n > 1 and temperature == 0:
        raise UsageError(f"--n {n}: greedy completions are all the same. Use --n 1, or a temperature above 0.")
    if seed < 0:
        raise UsageError(f"--seed {seed} is negative. Use 0 or more.")


def encode_prompts(
    info: "TokenizerInfo",
    prompts: Sequence[str],
    max_prompt_tokens: int,
    max_tokens: int,
    system_prompt: str | None = None,
    chat_template: bool = True,
) -> list[list[int]]:
    """Token ids of each prompt, encoded as in training. Raises UsageError for one that does not fit, DataError for an empty one."""
    from grpo_worker.data.tokenize import PromptEncoder

    if max_prompt_tokens < 1:
        raise UsageError(
            f"--max-tokens {max_tokens} fills the model's context of {max_prompt_tokens + max_tokens} tokens. Lower it."
        )
    encoder = PromptEncoder(
        info.tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        filter_overlong=True,
        chat_template="auto" if chat_template else "never",
        system_prompt=system_prompt,
    )
    encoded = encoder.encode_batch(list(prompts), lambda position: f"prompt {position + 1}")
    token_ids = []
    for position, prompt in enumerate(encoded):
        if prompt is None:
            raise UsageError(
                f"prompt {position + 1} ({prompts[position][:40]!r}) is longer than {max_prompt_tokens} tokens: the model's "
                f"context is {max_prompt_tokens + max_tokens} and --max-tokens takes {max_tokens}. Shorten it, or lower --max-tokens."
            )
        token_ids.append(prompt.token_ids)
    return token_ids


async def _run(options: Any, request: "GenerateRequest") -> dict[str, list[list[int]]]:
    """Completions' token ids by prompt id."""
    from grpo_worker.protocol.messages import GroupResult
    from grpo_worker.rollout.engine import RolloutEngine
    from grpo_worker.rollout.generation import generate as stream

    engine = RolloutEngine(options)
    completions: dict[str, list[list[int]]] = {}
    try:
        await engine.start()
        async for result in stream(engine, request):
            if not isinstance(result, GroupResult):
                continue
            if result.error_kind == "deadline":
                raise RetryableError(f"{result.error}. Ask for fewer tokens or prompts, or give --timeout-seconds.")
            if result.error:
                raise DataError(result.error)
            completions[result.id] = [sample.token_ids.numpy().tolist() for sample in result.samples]
    finally:
        engine.shutdown()
    return completions


def _context_tokens(model: Path) -> int:
    """The model's context, from config.json."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return int(config.get("max_position_embeddings") or DEFAULT_CONTEXT_TOKENS)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{model / 'config.json'} cannot be read ({error}). Copy the model again.") from error


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; in a `.jsonl` file, the `prompt` of each line."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts-file {file}: cannot be read: {error}") from error
    if file.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UsageError(f'--prompts-file {file} line {number}: is not {{"prompt": "text"}}.')
        prompts.append(prompt)
    return prompts
