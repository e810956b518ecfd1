"""One training step: mini-batches, each a pass of packed micro-batches and one optimizer update; and log-probs
without it.

Invariant: the gradient of a mini-batch does not depend on how it was cut into micro-batches or spread over ranks:
losses are divided by counts over the whole mini-batch, known to each rank from the message, and gradients are summed.
Sequences whose gradient is exactly zero are counted and not computed.
"""

import resource
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from grpo_worker.algorithms.aggregation import LossNormalizer, aggregate, total_loss
from grpo_worker.algorithms.correction import corrected, weights_of_part
from grpo_worker.algorithms.kl import kl_penalty
from grpo_worker.algorithms.losses import POLICY_LOSSES, PolicyLoss, PolicyLossInputs, aggregation_of
from grpo_worker.config.actor import Ref
from grpo_worker.config.rollout import Rollout
from grpo_worker.errors import DataError
from grpo_worker.trainer.batch import MicroBatch, Sequences, collate, neighbours_with_one_prompt, stand_in, to_device
from grpo_worker.trainer.distributed import Ranks, max_over_ranks, sum_dicts_over_ranks, sum_over_ranks
from grpo_worker.trainer.learning_rate import learning_rate
from grpo_worker.trainer.mfu import ModelFlops, device_peak, parity_tokens
from grpo_worker.trainer.model import PolicyModel, set_reductions
from grpo_worker.trainer.optimizer import PolicyOptimizer
from grpo_worker.trainer.options import TrainerOptions
from grpo_worker.trainer.packing import packing_efficiency, plan_micro_batches, rank_imbalance

GIB = 1024**3
# Prompt and response. Compiled code takes any number of tokens; only a number that kernels are aligned to would get code of its own.
WARM_UP_LENGTHS = ((11, 30), (6, 20))


@dataclass
class TrainerState:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    updates: int = 0  # optimizer updates, skipped ones included: the schedule goes on
    skipped_updates: int = 0


def compute_log_probs(
    model: PolicyModel, sequences: Sequences, options: TrainerOptions, ranks: Ranks, limits: Rollout | Ref
) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs, entropy), float32 [response tokens], the same on all ranks. Collective.

    `limits` is the section whose logProb fields bound a forward pass.
    """
    result = torch.zeros(2, sequences.response_tokens)
    budget = limits.log_prob_max_token_len_per_gpu or options.spec.actor.token_budget
    parity = parity_tokens(ModelFlops.of(model.lm))
    members = range(sequences.count)
    plan = _Plan(sequences, members, options, ranks, parity, budget, limits.log_prob_micro_batch_size_per_gpu)
    with torch.no_grad():
        for batch in plan.micro_batches():
            log_probs, entropy = model(batch, options.spec.rollout.temperature)
            if not batch.empty:
                result[:, torch.from_numpy(batch.response_index)] = torch.stack([log_probs, entropy]).cpu()
    # FSDP frees gathered parameters in the backward pass; there was none, and an update would leave them stale.
    release_gathered(model)
    sum_over_ranks(result, ranks)
    return result[0].numpy(), result[1].numpy()


def release_gathered(model: PolicyModel) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Updater:
    """Runs updates on one model and its optimizer, and counts them in `state`."""

    def __init__(
        self,
        model: PolicyModel,
        optimizer: PolicyOptimizer,
        options: TrainerOptions,
        ranks: Ranks,
        loss: PolicyLoss,
        state: TrainerState,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.options = options
        self.ranks = ranks
        self.loss = loss
        self.state = state
        self._own_log_probs: list[tuple[np.ndarray, Tensor]] = []  # of this step, where the batch has no old ones
        self.flops = ModelFlops.of(model.lm)
        self.peak_flops = device_peak(ranks.device, options.compute_dtype)

    def update(self, sequences: Sequences, step: int, total_steps: int = 0) -> dict[str, float]:
        """All mini-batches of training step `step` of `total_steps` (0: unknown), `ppo_epochs` times. Collective.

        Raises DataError for missing values.
        """
        self.check(sequences)
        spec = self.options.spec
        epochs = spec.actor.ppo_epochs
        updates = epochs * len(sequences.mini_batch_sequences)
        # What was made, not what was planned for the steps behind: a step may have had fewer groups, a resume another batch size.
        later = max(total_steps - step, 0) * spec.actor.updates_per_step(spec.data.train_batch_size)
        total_updates = self.state.updates + updates + later if total_steps else 0
        started = time.perf_counter()
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.ranks.device))
        facts: dict[str, list[float]] = defaultdict(list)
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trained = self._trained(sequences)
        self._own_log_probs = []
        for _ in range(epochs):
            first = 0
            for count in sequences.mini_batch_sequences:
                self._mini_batch(sequences, range(first, first + count), trained, total_updates, sums, facts)
                first += count
        self.state.step = step
        mismatch = self._mismatch(sequences, trained) if "rollout_log_probs" in sequences.values else {}
        computed = max(len(facts.get("perf/micro_batches", ())), 1)  # mini-batches with something to learn from
        means = {
            name: float(value) / (updates if name == "actor/pg_loss" else computed) for name, value in sums.items()
        }
        metrics = sum_dicts_over_ranks(means, self.ranks)
        flops = sum(facts.pop("flops", []))
        metrics |= {name: float(np.mean(values)) for name, values in facts.items() if not name.startswith("timing_s/")}
        metrics |= {name: float(np.sum(values)) for name, values in facts.items() if name.startswith("timing_s/")}
        seconds = time.perf_counter() - started
        metrics["actor/trained_sequences"] = float(trained.sum())
        metrics["actor/skipped_updates"] = float(self.state.skipped_updates)
        metrics["timing_s/trainer_update"] = seconds
        metrics["perf/update_tokens_per_second_per_gpu"] = (
            epochs * int(np.dot(sequences.lengths, trained)) / seconds / self.ranks.world_size
        )
        if flops and self.peak_flops:
            metrics["perf/mfu/actor"] = flops / seconds / self.ranks.world_size / self.peak_flops
        return metrics | mismatch | memory_metrics(self.ranks)

    def _mini_batch(
        self,
        sequences: Sequences,
        members: range,
        trained: np.ndarray,
        total_updates: int,
        sums: dict[str, Tensor],
        facts: dict[str, list[float]],
    ) -> None:
        started = time.perf_counter()
        actor = self.options.spec.actor
        self.state.updates += 1
        lr = learning_rate(actor.optim, total_updates, self.state.updates)
        facts["actor/lr"].append(lr)
        computing = [i for i in members if trained[i]]
        if not computing:  # nothing to learn from: momentum alone must not move the weights
            self.state.skipped_updates += 1
            return
        lengths = [sequences.lengths[i] for i in computing]
        parity = parity_tokens(self.flops)
        plan = _Plan(
            sequences,
            computing,
            self.options,
            self.ranks,
            parity,
            actor.token_budget,
            actor.ppo_micro_batch_size_per_gpu,
        )
        whole, part = (self._normalizer(sequences, some) for some in (members, computing))
        for number, batch in enumerate(plan.micro_batches(), 1):
            set_reductions(self.model, self.ranks.mesh, actor.fsdp, last=number == plan.packing.micro_batches)
            self._forward_backward(batch, sequences, whole, part, sums)
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        computed = time.perf_counter()
        result = self.optimizer.step(lr)
        facts["actor/grad_norm"].append(result.grad_norm)
        self.state.skipped_updates += result.skipped
        if self.flops:
            facts["flops"].append(self.flops.training(lengths) - self.flops.training(plan.spared_prompts))
        facts["timing_s/trainer_forward_backward"].append(computed - started)
        facts["timing_s/trainer_optimizer"].append(time.perf_counter() - computed)
        facts["perf/micro_batches"].append(plan.packing.micro_batches)
        facts["perf/packing_efficiency"].append(packing_efficiency(plan.packing, plan.lengths, actor.token_budget))
        facts["perf/rank_imbalance"].append(rank_imbalance(plan.packing, plan.lengths, parity))

    def _trained(self, sequences: Sequences) -> np.ndarray:
        """Which sequences have to be computed, bool [sequences]: not those whose every term of the loss has no gradient.

        Our policy losses are products with the advantage and the importance weight. KL, entropy and a person's own loss may
        have a gradient where these are zero.
        """
        actor, values = self.options.spec.actor, sequences.values
        signal = sequences.response_mask > 0
        if actor.loss_mode in POLICY_LOSSES and not actor.use_kl_loss and not actor.entropy_coeff:
            signal = signal & (values["advantages"] != 0) & (values.get("is_weights", np.ones(1)) != 0)
        return np.logical_or.reduceat(signal, sequences.response_offsets[:-1])

    def _normalizer(self, sequences: Sequences, members: Iterable[int]) -> LossNormalizer:
        """The counts of `members` of the mini-batch, over all ranks."""
        valid = np.add.reduceat(sequences.response_mask > 0, sequences.response_offsets[:-1], dtype=np.int64)
        counts = valid[list(members)]
        return LossNormalizer(
            mode=self.options.spec.actor.loss_agg_mode,
            global_tokens=int(counts.sum()),
            global_seqs=int((counts > 0).sum()),
            max_response_tokens=self.options.spec.data.max_response_length,
        )

    def _forward_backward(
        self,
        batch: MicroBatch,
        sequences: Sequences,
        normalizer: LossNormalizer,
        computed: LossNormalizer,
        sums: dict[str, Tensor],
    ) -> None:
        """`normalizer` counts the whole mini-batch, for the loss; `computed` what is computed of it, for metrics."""
        log_probs, entropy = self.model(batch, self.options.spec.rollout.temperature)
        if batch.empty:
            (log_probs.sum() * 0.0).backward()
            return
        actor = self.options.spec.actor
        value = self._values(sequences, batch)
        mask = value("response_mask")
        assert mask is not None
        num_seqs = len(batch.lengths)
        old, is_weights = value("old_log_probs"), value("is_weights")
        if old is None:
            old = log_probs.detach()
            correction = self.options.spec.algorithm.rollout_correction
            is_weights = weights_of_part(old, value("rollout_log_probs"), mask, batch.seq_ids, num_seqs, correction)
            self._own_log_probs.append((batch.response_index, old))
        outcome = self.loss(
            PolicyLossInputs(
                log_probs=log_probs,
                old_log_probs=old,
                advantages=value("advantages"),
                mask=mask,
                seq_ids=batch.seq_ids,
                num_seqs=num_seqs,
                clip_ratio_low=actor.clip_ratio_low,
                clip_ratio_high=actor.clip_ratio_high,
                clip_ratio_c=actor.clip_ratio_c,
            )
        )
        kl = None
        if actor.use_kl_loss:
            kl = kl_penalty(log_probs, value("ref_log_probs"), actor.kl_loss_type)
        total = total_loss(
            outcome.loss,
            mask,
            batch.seq_ids,
            num_seqs,
            normalizer,
            policy_mode=aggregation_of(actor.loss_mode, normalizer.mode),
            is_weights=is_weights,
            kl=kl,
            kl_coef=actor.kl_loss_coef,
            entropy=entropy,
            entropy_coef=actor.entropy_coeff,
        )
        total.total.backward()
        mean_entropy = aggregate(entropy.detach(), mask, batch.seq_ids, num_seqs, computed)
        parts = {"actor/pg_loss": total.policy, "actor/entropy": mean_entropy}
        if actor.use_kl_loss:
            parts["actor/kl_loss"] = total.kl
        tokens = computed.global_tokens
        shares = {_metric_name(name): value / tokens for name, value in outcome.metrics.items()}
        for name, part in (parts | shares).items():
            sums[name] += part.detach()

    def _values(self, sequences: Sequences, batch: MicroBatch) -> Any:
        index, device = batch.response_index, self.ranks.device

        def value(name: str) -> Tensor | None:
            array = sequences.response_mask if name == "response_mask" else sequences.values.get(name)
            return None if array is None else to_device(torch.from_numpy(array[index]), device)

        return value

    def _mismatch(self, sequences: Sequences, trained: np.ndarray) -> dict[str, float]:
        """Metrics of engine and trainer over the sequences that were computed. Collective."""
        old = torch.zeros(sequences.response_tokens)
        for index, log_probs in self._own_log_probs:
            old[torch.from_numpy(index)] = log_probs.float().cpu()
        sum_over_ranks(old, self.ranks)
        seq_ids = torch.from_numpy(np.repeat(np.arange(sequences.count), sequences.response_lengths))
        mask = torch.from_numpy(sequences.response_mask * trained[seq_ids.numpy()])
        rollout = torch.from_numpy(sequences.values["rollout_log_probs"])
        correction = self.options.spec.algorithm.rollout_correction
        return corrected(old, rollout, mask, seq_ids, sequences.count, correction).metrics

    def warm_up(self) -> None:
        """Compile what an update runs, on a few tokens, before there is anything to learn from. Collective."""
        sequences = Sequences.of(stand_in(WARM_UP_LENGTHS))
        set_reductions(self.model, self.ranks.mesh, self.options.spec.actor.fsdp, last=True)
        batch = collate(
            sequences, range(sequences.count), self.options.spec.model.use_remove_padding, self.ranks.device
        )
        log_probs, entropy = self.model(batch, self.options.spec.rollout.temperature)
        learned = log_probs.sum() + entropy.sum() if self.options.spec.actor.entropy_coeff else log_probs.sum()
        learned.backward()
        self.optimizer.forget_gradients()

    def check(self, sequences: Sequences) -> None:
        """Raises DataError when the batch lacks what the loss needs."""
        spec = self.options.spec
        one_update = spec.actor.ppo_epochs * len(sequences.mini_batch_sequences) == 1
        own = (
            one_update
            and spec.algorithm.rollout_correction.of_each_sequence
            and "rollout_log_probs" in sequences.values
        )
        needed = ["advantages"] + ["old_log_probs"] * (not own) + ["ref_log_probs"] * spec.actor.use_kl_loss
        missing = [name for name in needed if name not in sequences.values]
        if missing:
            raise DataError(f"update: the batch has no {', '.join(missing)}")


def memory_metrics(ranks: Ranks) -> dict[str, float]:
    """Peaks since the last reset, of the worst rank. Collective."""
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB]
    if ranks.device.type == "cuda":
        peaks += [torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB]
    worst = max_over_ranks(torch.tensor(peaks, dtype=torch.float64), ranks).tolist()
    # verl's names, which say gb and mean GiB; its perf/cpu_memory_used_gb is the whole machine's, so the process's own has another name.
    names = ["perf/max_cpu_memory_gib", "perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb"]
    return dict(zip(names, worst, strict=False))


class _Plan:
    """Which of `members` are computed together: `fixed` of them when that is given, else up to `max_tokens`."""

    def __init__(
        self,
        sequences: Sequences,
        members: Sequence[int],
        options: TrainerOptions,
        ranks: Ranks,
        parity: float,
        max_tokens: int,
        fixed: int | None,
    ) -> None:
        self._sequences, self._options, self._ranks = sequences, options, ranks
        self._share = options.spec.actor.share_prompts and fixed is None
        # What stays together, and how many tokens that is.
        self._items = (
            neighbours_with_one_prompt(sequences, members, max_tokens) if self._share else [[i] for i in members]
        )
        self.lengths = [
            int(sequences.prompt_lengths[item[0]] + sequences.response_lengths[item].sum()) for item in self._items
        ]
        self.spared_prompts = [int(sequences.prompt_lengths[i]) for item in self._items for i in item[1:]]
        budget = None if fixed else max_tokens
        self.packing = plan_micro_batches(self.lengths, ranks.world_size, budget, fixed, parity)

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Of this rank."""
        packed, device = self._options.spec.model.use_remove_padding, self._ranks.device
        for items in self.packing.ranks[self._ranks.rank]:
            together = [i for item in items for i in self._items[item]]
            yield collate(self._sequences, together, packed, device, self._share)


def _metric_name(name: str) -> str:
    return name if "/" in name else f"actor/{name}"
