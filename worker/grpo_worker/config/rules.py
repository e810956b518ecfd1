"""Contradictions between fields: each rule once, as a Python check and as the CEL expression of the CRD.

Invariant: `grpo validate` and the API server refuse the same documents, since both read this table. A rule's CEL runs on
`spec` after the schema's defaults are filled in; fields that a preset may set have no default there, hence `has()`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_worker.config.job import Spec


@dataclass(frozen=True)
class Rule:
    """One contradiction. `path` is the field to change, `check` is true for a sound spec."""

    path: str
    check: Callable[[Spec], bool]
    cel: str
    message: str
    remedy: str
    value: Callable[[Spec], Any]


def _both_absent(*pairs: tuple[Any, Any]) -> bool:
    return all(a is None or b is None for a, b in pairs)


RULES: tuple[Rule, ...] = (
    Rule(
        "actor.useKLLoss",
        lambda s: not (s.algorithm.use_kl_in_reward and s.actor.use_kl_loss),
        "!(self.algorithm.useKLInReward && (has(self.actor.useKLLoss) ? self.actor.useKLLoss : "
        "has(self.algorithm.preset) && self.algorithm.preset == 'GRPO'))",
        "algorithm.useKLInReward and actor.useKLLoss are both on, so the KL would count twice",
        "Set one of them to false (preset GRPO turns useKLLoss on).",
        lambda s: s.actor.use_kl_loss,
    ),
    Rule(
        "rollout.n",
        lambda s: (
            s.rollout.n >= 2 or s.algorithm.advantage_estimator not in {"grpo", "rloo", "reinforcePlusPlusBaseline"}
        ),
        "self.rollout.n >= 2 || (has(self.algorithm.advantageEstimator) && !(self.algorithm.advantageEstimator in ['grpo', 'rloo', 'reinforcePlusPlusBaseline']))",
        "the advantage estimator compares the samples of a group, so it needs at least 2",
        "Set rollout.n to 2 or more, or algorithm.advantageEstimator to reinforce or reinforcePlusPlus.",
        lambda s: s.rollout.n,
    ),
    Rule(
        "actor.ppoMiniBatchSize",
        lambda s: s.data.train_batch_size % s.actor.ppo_mini_batch_size == 0,
        "self.data.trainBatchSize % self.actor.ppoMiniBatchSize == 0",
        "does not divide data.trainBatchSize",
        "Choose a divisor of data.trainBatchSize.",
        lambda s: s.actor.ppo_mini_batch_size,
    ),
    Rule(
        "rollout.minReplicas",
        lambda s: s.rollout.min_replicas is None or s.rollout.min_replicas <= s.rollout.replicas,
        "!has(self.rollout.minReplicas) || self.rollout.minReplicas <= self.rollout.replicas",
        "is more than rollout.replicas, so generation could never start",
        "Lower rollout.minReplicas or raise rollout.replicas.",
        lambda s: s.rollout.min_replicas,
    ),
    Rule(
        "data.trainFiles",
        lambda s: bool(s.data.train_files) != bool(s.data.dataset),
        "(size(self.data.trainFiles) > 0) != has(self.data.dataset)",
        "exactly one of data.trainFiles and data.dataset gives the prompts",
        "Set data.trainFiles to Parquet files, or data.dataset to module:function.",
        lambda s: s.data.train_files,
    ),
    Rule(
        "algorithm.overlongBuffer.length",
        lambda s: (
            s.algorithm.overlong_buffer.length is None
            or s.algorithm.overlong_buffer.length <= s.data.max_response_length
        ),
        "!has(self.algorithm.overlongBuffer.length) || self.algorithm.overlongBuffer.length <= self.data.maxResponseLength",
        "is longer than data.maxResponseLength",
        "Choose a part of data.maxResponseLength; DAPO takes a fifth.",
        lambda s: s.algorithm.overlong_buffer.length,
    ),
    Rule(
        "algorithm.rolloutCorrection.rolloutIsLowerThreshold",
        lambda s: (
            (low := s.algorithm.rollout_correction.rollout_is_lower_threshold) is None
            or low < s.algorithm.rollout_correction.rollout_is_threshold
        ),
        "!has(self.algorithm.rolloutCorrection.rolloutIsLowerThreshold) || "
        "self.algorithm.rolloutCorrection.rolloutIsLowerThreshold < self.algorithm.rolloutCorrection.rolloutIsThreshold",
        "is not below rolloutIsThreshold, so every weight would be 0",
        "Choose lower < threshold, e.g. 0.5 and 5.0.",
        lambda s: s.algorithm.rollout_correction.rollout_is_lower_threshold,
    ),
    Rule(
        "rollout.topK",
        lambda s: s.rollout.top_k != 0,
        "self.rollout.topK != 0",
        "0 would leave no token to sample",
        "Set -1 for all tokens, or 1 and more.",
        lambda s: s.rollout.top_k,
    ),
    Rule(
        "actor.ppoMicroBatchSizePerGPU",
        lambda s: _both_absent((s.actor.ppo_micro_batch_size_per_gpu, s.actor.ppo_max_token_len_per_gpu)),
        "!(has(self.actor.ppoMicroBatchSizePerGPU) && has(self.actor.ppoMaxTokenLenPerGPU))",
        "is set together with actor.ppoMaxTokenLenPerGPU",
        "Keep one: a number of sequences, or a token budget.",
        lambda s: s.actor.ppo_micro_batch_size_per_gpu,
    ),
    Rule(
        "ref.logProbMicroBatchSizePerGPU",
        lambda s: _both_absent((s.ref.log_prob_micro_batch_size_per_gpu, s.ref.log_prob_max_token_len_per_gpu)),
        "!(has(self.ref.logProbMicroBatchSizePerGPU) && has(self.ref.logProbMaxTokenLenPerGPU))",
        "is set together with ref.logProbMaxTokenLenPerGPU",
        "Keep one: a number of sequences, or a token budget.",
        lambda s: s.ref.log_prob_micro_batch_size_per_gpu,
    ),
    Rule(
        "rollout.logProbMicroBatchSizePerGPU",
        lambda s: _both_absent((s.rollout.log_prob_micro_batch_size_per_gpu, s.rollout.log_prob_max_token_len_per_gpu)),
        "!(has(self.rollout.logProbMicroBatchSizePerGPU) && has(self.rollout.logProbMaxTokenLenPerGPU))",
        "is set together with rollout.logProbMaxTokenLenPerGPU",
        "Keep one: a number of sequences, or a token budget.",
        lambda s: s.rollout.log_prob_micro_batch_size_per_gpu,
    ),
    Rule(
        "network.memberTimeoutSeconds",
        lambda s: s.network.member_timeout_seconds >= 3 * s.network.heartbeat_seconds,
        "self.network.memberTimeoutSeconds >= 3.0 * self.network.heartbeatSeconds",
        "is less than three heartbeats, so one late packet would lose a process",
        "Raise it to three times network.heartbeatSeconds or more.",
        lambda s: s.network.member_timeout_seconds,
    ),
)
