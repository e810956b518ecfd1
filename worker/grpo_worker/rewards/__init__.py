"""Rewards: what a response is worth, found by user code that the rest of the job never has to trust.

Invariant: a reward function runs only in a killable worker process with a time limit on each call. Its failure is an
outcome with a kind and a message, never a zero. Importing this package imports nothing heavy: a worker starts in tens
of milliseconds.

    base         RewardInput, RewardResult, and what a function may return
    lookup       `reward.function` -> a bound function
    gsm8k, math, exact_match, format, reasoning_gym      the built-in functions
    pool         RewardPool: score samples; process: one worker seen from the parent
    worker       the program that a worker runs; wire: the frames between the two
"""

from grpo_worker.rewards.base import RewardInput, RewardResult, TryAgain

__all__ = ["RewardInput", "RewardResult", "TryAgain"]
