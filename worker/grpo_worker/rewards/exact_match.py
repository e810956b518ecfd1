"""Exact match: is the response the ground truth, letter by letter?

Invariant: both texts go through the same normalisation before they are compared, so it can hide a difference but not
make one.
"""

import re

from grpo_worker.rewards.base import RewardInput, RewardResult


def normalise(text: str, *, strip: bool = True, normalise_whitespace: bool = True, ignore_case: bool = False) -> str:
    """`text` without outer blanks, with each run of blanks as one space, and case-folded, as the options say."""
    if normalise_whitespace:
        text = re.sub(r"\s+", " ", text)
    if strip:
        text = text.strip()
    return text.casefold() if ignore_case else text


def exact_match(
    sample: RewardInput, *, strip: bool = True, normalise_whitespace: bool = True, ignore_case: bool = False
) -> RewardResult:
    """1 when the normalised response equals the normalised ground truth, else 0."""
    response, truth = (
        normalise(text, strip=strip, normalise_whitespace=normalise_whitespace, ignore_case=ignore_case)
        for text in (sample.response, sample.ground_truth)
    )
    equal = float(response == truth)
    return RewardResult(equal, accuracy=equal, answer=response)
