"""The metrics of one step, in verl's names.

Invariant: a metric is a pure function of the step's data; names that a person's dashboards know from verl mean the same here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo_worker.coordinator.experience import Credited, Experience
from grpo_worker.coordinator.groups import Group
from grpo_worker.coordinator.schedule import Batch


def experience_metrics(credited: Credited, max_response_tokens: int) -> dict[str, float]:
    """Scores, rewards, advantages, lengths."""
    experience = credited.experience
    rewards = credited.token_rewards.new_zeros(experience.sequences).index_add(
        0, experience.seq_ids, credited.token_rewards
    )
    valid = credited.mask.bool()
    metrics = {
        **_summary("critic/score", experience.scores),
        **_summary("critic/rewards", rewards),
        **_summary("critic/advantages", credited.advantages[valid]),
        **_summary("response_length", experience.response_lengths.float()),
        **_summary("prompt_length", experience.prompt_lengths.float()),
        "response_length/clip_ratio": float((experience.response_lengths >= max_response_tokens).float().mean()),
    }
    metrics |= agent_metrics(experience)
    if bool((known := ~experience.accuracies.isnan()).any()):
        metrics["critic/accuracy/mean"] = float(experience.accuracies[known].mean())
    return metrics | credited.metrics


def agent_metrics(experience: Experience) -> dict[str, float]:
    """Turns, and the two kinds of response tokens, where an agent made the samples."""
    if not bool(experience.turns.any()):
        return {}
    sampled = torch.zeros(experience.sequences).index_add(0, experience.seq_ids, experience.mask.float())
    return {
        **_summary("agent/turns", experience.turns.float()),
        **_summary("agent/sampled_tokens", sampled),
        **_summary("agent/observed_tokens", experience.response_lengths.float() - sampled),
    }


def group_metrics(batch: Batch, version: int) -> dict[str, float]:
    """Staleness of the samples, what dynamic sampling left out, what failed. `version`: of the weights before the update."""
    samples = [sample for group in batch.ready for sample in group.samples]
    staleness = torch.tensor([float(version - sample.oldest_version) for sample in samples])
    spans = torch.tensor([float(len(sample.versions)) for sample in samples])
    kept, filtered = len(batch.ready), len(batch.filtered)
    scored = [*batch.ready, *batch.filtered]
    scores = [sample.reward.score for group in scored for sample in group.samples if sample.reward]
    return {
        **_summary("training/off_policy/trajectory_staleness", staleness),
        **_summary("training/off_policy/trajectory_spans", spans),
        "training/filter_groups/kept": float(kept),
        "training/filter_groups/filtered": float(filtered),
        **_summary("training/filter_groups/score", torch.tensor(scores)),
        "reward/solve_all": _share_solved(scored, 1.0),
        "reward/solve_none": _share_solved(scored, 0.0),
        "training/rollout_failure/evicted_prompts": float(len(batch.failed)),
        "training/zero_variance_groups": _share_without_variance(batch.ready),
        "response/aborted_ratio": sum(sample.finish_reason == "abort" for sample in samples) / max(len(samples), 1),
    }


def extra_reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means of the further numbers that the reward function returned, as reward/<name>/mean."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for sample in group.samples:
            for name, value in (sample.reward.extra if sample.reward else {}).items():
                values.setdefault(name, []).append(value)
    return {f"reward/{name}/mean": sum(numbers) / len(numbers) for name, numbers in sorted(values.items())}


def performance_metrics(experience: Experience, timing: Mapping[str, float], gpus: int) -> dict[str, float]:
    """Times of the step's parts and throughput: tokens (prompt and response) a second and GPU."""
    tokens = int(experience.prompt_lengths.sum() + experience.response_lengths.sum())
    seconds = timing["step"]
    metrics = {f"timing_s/{part}": value for part, value in timing.items()}
    sampled_tokens = int(experience.mask.sum())
    for part, count in (("gen", sampled_tokens), ("update_actor", tokens), ("old_log_prob", tokens)):
        if part in timing and count:
            metrics[f"timing_per_token_ms/{part}"] = timing[part] * 1000 / count
    return metrics | {
        "perf/total_num_tokens": float(tokens),
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / seconds / max(gpus, 1),
    }


def _summary(name: str, values: Tensor) -> dict[str, float]:
    if values.numel() == 0:
        return {}
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }


def _share_solved(groups: Sequence[Group], value: float) -> float:
    """Share of the groups whose samples all have this accuracy (the score, where the reward function gives no accuracy)."""
    solved = [
        all(
            (sample.reward.score if sample.reward.accuracy is None else sample.reward.accuracy) == value
            for sample in group.samples
            if sample.reward
        )
        for group in groups
    ]
    return sum(solved) / len(solved) if solved else 0.0


def _share_without_variance(groups: Sequence[Group]) -> float:
    flat = [
        len({sample.reward.score for sample in group.samples if sample.reward}) == 1
        for group in groups
        if len(group.samples) > 1
    ]
    return sum(flat) / len(flat) if flat else 0.0
