"""From a step's groups to new weights in the trainer: log-probs, advantages, update."""

import asyncio
from collections.abc import Sequence

from grpo_worker.algorithms import AdvantageEstimator, make_kl_controller
from grpo_worker.config import Spec
from grpo_worker.coordinator.experience import Credited, assemble, assign_credit
from grpo_worker.coordinator.groups import Group
from grpo_worker.coordinator.step_metrics import experience_metrics
from grpo_worker.coordinator.timing import Timer
from grpo_worker.coordinator.trainer_client import TrainerClient
from grpo_worker.protocol.messages import LogProbsReply, LogProbsRequest, UpdateReply, UpdateRequest


def needs_old_log_probs(spec: Spec, updates: int) -> bool:
    """Whether a step of so many optimizer updates takes a forward pass of its own for old log-probs: not when the update's own forward is
    that of the old policy, and nothing before the update or across the batch is made of it."""
    correction = spec.algorithm.rollout_correction
    if correction.bypass_mode:
        return False
    alone = updates == 1 and correction.of_each_sequence and not spec.algorithm.use_kl_in_reward
    return not alone or spec.actor.recompute_old_log_probs == "always"


class Learner:
    """`kl_controller` is part of the run's state; everything else is the document's."""

    def __init__(self, spec: Spec, trainer: TrainerClient, estimator: AdvantageEstimator) -> None:
        kl = spec.algorithm.kl_ctrl
        self.kl_controller = make_kl_controller(kl.type, kl.kl_coef, horizon=kl.horizon, target_kl=kl.target_kl)
        self._spec = spec
        self._trainer = trainer
        self._estimator = estimator

    async def learn(
        self, groups: Sequence[Group], step: int, total_steps: int, timer: Timer
    ) -> tuple[Credited, dict[str, float]]:
        """Train step `step` of a run that will have `total_steps` as far as one can tell. Raises TrainerLost, TrainerFailed, DataError."""
        spec = self._spec
        experience = assemble(groups, spec.actor.ppo_mini_batch_size)
        reference = spec.algorithm.use_kl_in_reward or spec.actor.use_kl_loss
        actor = needs_old_log_probs(spec, len(experience.mini_batch_sequences) * spec.actor.ppo_epochs)
        log_probs: LogProbsReply | None = None
        if actor or reference:
            with timer.part("old_log_prob"):
                request = LogProbsRequest(batch=experience.wire(), actor=actor, reference=reference)
                log_probs = await self._trainer.call(request, LogProbsReply)
        limit = spec.data.max_response_length
        with timer.part("adv"):
            credited = await asyncio.to_thread(
                assign_credit, experience, log_probs, spec.algorithm, self._estimator, self.kl_controller, limit
            )
        with timer.part("update_actor"):
            update = UpdateRequest(step=step, total_steps=total_steps, batch=credited.wire())
            reply = await self._trainer.call(update, UpdateReply)
        known = log_probs.metrics if log_probs else {}
        return credited, experience_metrics(credited, limit) | known | reply.metrics
