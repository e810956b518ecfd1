"""The learning rate as a function of the update's number.

Invariant: update k = 1, 2, ... uses `learning_rate(options, k)` and nothing else, so a resumed run has the rates of an
unbroken one. With W warm-up updates and T in total, lr(k) is

    k <= W:    base * k / W                                         (the last warm-up update runs at the full rate)
    constant:  base
    linear:    base * (m + (1 - m) * (1 - x))                       x = (k - W) / (T - W), at most 1
    cosine:    base * (m + (1 - m) * (1 + cos(pi x)) / 2)           m = min_lr_ratio
"""

import math

from grpo_worker.trainer.options import OptimizerOptions


def learning_rate(options: OptimizerOptions, update: int) -> float:
    """The rate of update number `update`, 1-based."""
    warmup = options.warmup_updates
    if update <= warmup:
        return options.lr * update / warmup
    if options.schedule == "constant" or options.total_updates <= warmup:
        return options.lr  # without a known end there is nothing to decay towards
    progress = min(1.0, (update - warmup) / (options.total_updates - warmup))
    decay = 1 - progress if options.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return options.lr * (options.min_lr_ratio + (1 - options.min_lr_ratio) * decay)
