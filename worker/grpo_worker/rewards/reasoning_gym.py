"""Reasoning Gym: the task's own `score_answer`, on the entry that made the prompt.

Invariant: the row carries all that scoring needs: column `task` (the data set's name) and column `entry` (question,
answer and metadata, as JSON). Nothing is generated again, so the score does not hang on a seed.
"""

import json
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import Any

from reasoning_gym import get_score_answer_fn
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from grpo_worker.rewards.base import RewardInput, RewardResult

# These compare the answer's grid of tuples to `metadata["output"]`, which JSON has turned into lists.
_TUPLE_GRIDS = ("arc_agi", "rearc")


@cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    if task not in DATASETS:
        close = get_close_matches(task, DATASETS, n=3)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise ValueError(f"column 'task': reasoning-gym has no task {task!r}{hint}")
    scorer: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(task)
    return scorer


def rebuild_entry(data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The row's task name and entry.

    Raises:
        ValueError: a column is missing, or `entry` is not a JSON object with question, answer and metadata.
    """
    missing = [column for column in ("task", "entry") if column not in data]
    if missing:
        raise ValueError(f"the row has no column {missing[0]!r} (columns: {', '.join(data) or 'none'})")
    entry = json.loads(data["entry"]) if isinstance(data["entry"], str | bytes) else data["entry"]
    if not isinstance(entry, dict) or not {"question", "answer", "metadata"} <= entry.keys():
        raise ValueError("column 'entry' is not a JSON object with question, answer and metadata")
    task = str(data["task"])
    if task in _TUPLE_GRIDS:
        grid = tuple(tuple(row) for row in entry["metadata"]["output"])
        entry = {**entry, "metadata": {**entry["metadata"], "output": grid}}
    return task, entry


def reasoning_gym(sample: RewardInput, *, answer_tag: str | None = "answer") -> RewardResult:
    """The task's score of the answer (0 to 1, partial where the task says so); accuracy is 1 at full score.

    The answer is what the last `<answer_tag>` holds, or the whole stripped response when there is none or `answer_tag`
    is null.
    """
    task, entry = rebuild_entry(sample.data)
    tagged = extract_answer(sample.response, tag_name=answer_tag) if answer_tag else None
    answer = sample.response.strip() if tagged is None else tagged
    score = float(_scorer(task)(answer, entry))
    return RewardResult(score, accuracy=float(score >= 1.0))
