"""A short supervised phase: the model learns to add column by column, from a teacher who mostly forgets the carry.

Afterwards it knows the format and the digits, and that a carry may be added; greedily it is right where there is nothing to carry.
That is the kind of start that GRPO needs: right answers are sampled now and then, and the reward tells them apart.

Invariant: on one machine the weights are a function of the model, the problems and the seed; held-out problems are never seen.
One thread does the arithmetic: its sums then have one order, and threads would spend longer waiting than at work on so small a model.
"""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from grpo_worker.demo.tasks import MARKER, RESPONSE_TOKENS, Problem, random_problem, worked_response

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Recipe:
    """Numbers of the supervised phase; `forget_carry` is the share of carries that the teacher forgets."""

    steps: int = 600
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    forget_carry: float = 0.65


def warm_up(
    model: "Qwen3ForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    held_out: Collection[Problem],
    seed: int,
    recipe: Recipe | None = None,
) -> float:
    """Train in place; the mean loss of the last 20 steps, in nats a token."""
    import torch

    recipe = recipe or Recipe()
    rng, excluded = random.Random(seed), frozenset(held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses: list[float] = []
    model.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(step, recipe)
        problems = [_problem(rng, excluded) for _ in range(recipe.batch_size)]
        responses = [worked_response(problem, lambda: rng.random() >= recipe.forget_carry) for problem in problems]
        input_ids, labels = _batch(tokenizer, problems, responses)
        logits = model(input_ids=input_ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED_LABEL
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    torch.set_num_threads(threads)
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def greedy_responses(
    model: "Qwen3ForCausalLM", tokenizer: "PreTrainedTokenizerFast", problems: Sequence[Problem]
) -> list[str]:
    """The model's greedy response to each problem."""
    import torch

    prompts = torch.tensor([tokenizer(problem.prompt)["input_ids"] for problem in problems])
    with torch.no_grad():
        output = cast(Any, model).generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=RESPONSE_TOKENS,
        )
    responses = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
    return [str(response) for response in responses]


def accuracy(problems: Sequence[Problem], responses: Sequence[str]) -> float:
    """Share of responses with the right number behind the marker."""
    right = [
        response.partition(f"{MARKER} ")[2] == problem.answer
        for problem, response in zip(problems, responses, strict=True)
    ]
    return sum(right) / len(right)


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _problem(rng: random.Random, excluded: Collection[Problem]) -> Problem:
    while True:
        problem = random_problem(rng)
        if problem not in excluded:
            return problem


def _batch(
    tokenizer: "PreTrainedTokenizerFast", problems: Sequence[Problem], responses: Sequence[str]
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Token ids and labels [batch, tokens], padded on the right; labels of prompt and padding are ignored by the loss."""
    import torch

    rows = []
    for problem, response in zip(problems, responses, strict=True):
        prompt = tokenizer(problem.prompt)["input_ids"]
        rows.append((prompt, [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    labels = torch.full((len(rows), width), _IGNORED_LABEL)
    for index, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[index, :end] = torch.tensor([*prompt, *answer])
        labels[index, len(prompt) : end] = torch.tensor(answer)
    return input_ids, labels
