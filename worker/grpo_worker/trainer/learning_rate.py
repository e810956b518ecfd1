"""The learning rate as a function of the update's number.

Invariant: update k = 1, 2, ... uses `learning_rate(optim, T, k)` and nothing else, so a resumed run has the rates of an
unbroken one. With W warm-up updates and T in total, lr(k) is

    k <= W:    base * k / W                                         (the last warm-up update runs at the full rate)
    constant:  base
    linear:    base * (m + (1 - m) * (1 - x))                       x = (k - W) / (T - W), at most 1
    cosine:    base * (m + (1 - m) * (1 + cos(pi x)) / 2)           m = min_lr_ratio
"""

import math

from grpo_worker.config.actor import Optim


def learning_rate(optim: Optim, total_updates: int, update: int) -> float:
    """The rate of update number `update`, 1-based, of `total_updates` (0: not known)."""
    warmup = optim.lr_warmup_steps
    if update <= warmup:
        return optim.lr * update / warmup
    if optim.lr_scheduler == "constant" or total_updates <= warmup:
        return optim.lr  # without a known end there is nothing to decay towards
    progress = min(1.0, (update - warmup) / (total_updates - warmup))
    decay = 1 - progress if optim.lr_scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * decay)
