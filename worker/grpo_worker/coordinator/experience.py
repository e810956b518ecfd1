"""From groups to what the trainer learns from: the pure middle of the pipeline.

Invariant: arrays are ragged and flat (see `grpo_worker.algorithms.ragged`): sequences in the order of groups, tokens in the order of
sequences; what is computed here depends on the batch alone, never on ranks or micro-batches.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from grpo_worker.algorithms import (
    AdvantageEstimator,
    AdvantageInputs,
    KLController,
    checked,
    corrected,
    kl_penalty,
    outcome_rewards,
    overlong_penalty,
    penalize_rewards,
)
from grpo_worker.config.algorithm import Algorithm, OverlongBuffer
from grpo_worker.coordinator.groups import Group
from grpo_worker.errors import DataError, GRPOError
from grpo_worker.functions import traceback_tail
from grpo_worker.protocol.messages import Array, LogProbsReply, TrainBatch


@dataclass(frozen=True)
class Experience:
    """One step's sequences.

    prompt_lengths, response_lengths, group_ids, scores, accuracies `[sequences]` (accuracy NaN where the reward function gives none);
    token_ids `[all tokens]`; rollout_log_probs, seq_ids, mask `[response tokens]`; mask is False at tokens that an agent observed: no
    formula counts them, though the log-probs of later tokens depend on them.
    rollout_log_probs are NaN in samples that came without. turns `[sequences]`; mini_batch_sequences: sequences of each optimizer step.
    """

    prompt_lengths: Tensor
    response_lengths: Tensor
    token_ids: np.ndarray
    rollout_log_probs: Tensor
    seq_ids: Tensor
    mask: Tensor
    group_ids: Tensor
    scores: Tensor
    accuracies: Tensor
    turns: Tensor
    mini_batch_sequences: list[int]

    @property
    def sequences(self) -> int:
        return self.response_lengths.numel()

    def wire(self) -> TrainBatch:
        """What `compute_log_probs` needs."""
        return TrainBatch(
            prompt_lengths=Array.of(self.prompt_lengths.numpy(), "int32"),
            response_lengths=Array.of(self.response_lengths.numpy(), "int32"),
            token_ids=Array.of(self.token_ids, "int32"),
            response_mask=Array.of(self.mask.to(torch.uint8).numpy(), "uint8"),
            mini_batch_sequences=self.mini_batch_sequences,
        )


def assemble(groups: Sequence[Group], groups_per_mini_batch: int) -> Experience:
    """Flatten scored groups. A group is never split over two optimizer steps."""
    samples = [
        (index, group.prompt.token_ids, sample) for index, group in enumerate(groups) for sample in group.samples
    ]
    lengths = torch.tensor([len(sample.token_ids) for _, _, sample in samples])
    parts: list[np.ndarray] = []
    for _, prompt, sample in samples:
        parts += [np.asarray(prompt, dtype=np.int32), sample.token_ids]
    rewards = [sample.reward for _, _, sample in samples]
    assert all(reward is not None for reward in rewards), (
        "a group is trained on only when all of its samples are scored"
    )
    accuracies = [float("nan") if r.accuracy is None else r.accuracy for r in rewards if r is not None]
    return Experience(
        prompt_lengths=torch.tensor([len(prompt) for _, prompt, _ in samples]),
        response_lengths=lengths,
        token_ids=np.concatenate(parts),
        rollout_log_probs=torch.from_numpy(np.concatenate([sample.log_probs for _, _, sample in samples])),
        seq_ids=torch.repeat_interleave(torch.arange(len(samples)), lengths),
        mask=torch.from_numpy(np.concatenate([sample.sampled for _, _, sample in samples])),
        group_ids=torch.tensor([index for index, _, _ in samples]),
        scores=torch.tensor([r.score for r in rewards if r is not None], dtype=torch.float32),
        accuracies=torch.tensor(accuracies, dtype=torch.float32),
        turns=torch.tensor([sample.turns for _, _, sample in samples]),
        mini_batch_sequences=[
            sum(len(group.samples) for group in mini_batch)
            for mini_batch in split_evenly(groups, groups_per_mini_batch)
        ],
    )


def split_evenly(groups: Sequence[Group], at_most: int) -> list[Sequence[Group]]:
    """As few mini-batches of at most so many groups as there can be, whose sizes differ by one at most: each is one optimizer update of
    the same learning rate, so none may be much smaller than the others."""
    number = -(-len(groups) // at_most)
    ends = [-(-len(groups) * index // number) for index in range(number + 1)]
    return [groups[start:end] for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Credited:
    """An experience with everything that the update needs, and the metrics of the way there. All `[response tokens]`.

    Without old_log_probs and is_weights the update makes them of its own forward pass.
    """

    experience: Experience
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    token_rewards: Tensor
    advantages: Tensor
    is_weights: Tensor | None
    mask: Tensor
    metrics: dict[str, float]

    def sample_advantages(self) -> list[float]:
        """Mean over the tokens that the update trains on, a sample each; 0 where there is none."""
        sums, counts = (torch.zeros(self.experience.sequences, dtype=torch.float64) for _ in range(2))
        sums.index_add_(0, self.experience.seq_ids, (self.advantages * self.mask).double())
        counts.index_add_(0, self.experience.seq_ids, self.mask.double())
        return (sums / counts.clamp(min=1)).tolist()

    def wire(self) -> TrainBatch:
        """What `update` needs."""
        return msgspec.structs.replace(
            self.experience.wire(),
            response_mask=Array.of(self.mask.to(torch.uint8).numpy(), "uint8"),
            old_log_probs=_array(self.old_log_probs),
            rollout_log_probs=_array(self.experience.rollout_log_probs) if self.old_log_probs is None else None,
            ref_log_probs=_array(self.ref_log_probs),
            advantages=_array(self.advantages),
            is_weights=_array(self.is_weights),
        )


def assign_credit(
    experience: Experience,
    log_probs: LogProbsReply | None,
    algorithm: Algorithm,
    estimator: AdvantageEstimator,
    kl_controller: KLController,
    max_response_tokens: int,
) -> Credited:
    """Rewards -> advantages, and the correction of the engine's log-probs.

    Old log-probs are the trainer's where `log_probs` has them, the engine's in bypass mode (every weight is 1 then), else the update's own.
    """
    metrics: dict[str, float] = {}
    old = _tensor(log_probs.log_probs) if log_probs and log_probs.log_probs else None
    if algorithm.rollout_correction.bypass_mode:
        old = experience.rollout_log_probs
    ref = _tensor(log_probs.ref_log_probs) if log_probs and log_probs.ref_log_probs else None
    mask = experience.mask
    rewards = experience.scores
    if algorithm.overlong_buffer.enable:
        penalty = _overlong(experience, algorithm.overlong_buffer, max_response_tokens)
        metrics["reward/overlong_penalty/mean"] = float(penalty.mean())
        rewards = rewards + penalty
    token_rewards = outcome_rewards(rewards, experience.seq_ids)
    if algorithm.use_kl_in_reward:
        assert ref is not None and old is not None, "the coordinator asks for both when a KL term is on"
        kl = kl_penalty(old, ref, algorithm.kl_penalty)
        coefficient = kl_controller.coefficient
        token_rewards, batch_kl = penalize_rewards(
            token_rewards, kl, mask, experience.seq_ids, experience.sequences, coefficient
        )
        kl_controller.update(batch_kl, experience.sequences)
        metrics |= {"actor/reward_kl_penalty": batch_kl, "actor/reward_kl_penalty_coeff": coefficient}
    inputs = AdvantageInputs(
        sequence_rewards=rewards,
        token_rewards=token_rewards,
        mask=mask,
        seq_ids=experience.seq_ids,
        group_ids=experience.group_ids,
        norm_by_std=algorithm.norm_adv_by_std,
        gamma=algorithm.gamma,
    )
    advantages = checked(
        algorithm.advantage_estimator, _estimate(estimator, inputs, algorithm.advantage_estimator), inputs
    )
    weights = None
    if old is not None:
        seq_ids, sequences = experience.seq_ids, experience.sequences
        correction = corrected(
            old, experience.rollout_log_probs, mask, seq_ids, sequences, algorithm.rollout_correction
        )
        weights, mask = correction.weights, correction.mask
        metrics |= correction.metrics
    return Credited(experience, old, ref, token_rewards, advantages, weights, mask, metrics)


def _estimate(estimator: AdvantageEstimator, inputs: AdvantageInputs, name: str) -> Tensor:
    try:
        return estimator(inputs)
    except GRPOError:
        raise
    except Exception as error:  # a person's own function may raise anything
        raise DataError(f"algorithm.advantageEstimator: {name!r} raised:\n{traceback_tail(error)}") from error


def _overlong(experience: Experience, options: OverlongBuffer, max_response_tokens: int) -> Tensor:
    buffer = options.length or max(1, max_response_tokens // 5)
    return overlong_penalty(experience.response_lengths.float(), max_response_tokens, buffer, options.penalty_factor)


def _array(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else Array.of(tensor.numpy(), "float32")


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array.numpy().copy())
