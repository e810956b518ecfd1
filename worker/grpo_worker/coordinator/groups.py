"""A prompt's group on its way from the data to the trainer.

Invariant: each admitted prompt is one `Group`, and a group ends exactly once: trained, filtered or failed.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from grpo_worker.data.dataset import Prompt
from grpo_worker.protocol.messages import VersionSpan
from grpo_worker.rewards.base import RewardResult


class GroupState(StrEnum):
    WAITING = "waiting"  # admitted, not sent
    RUNNING = "running"  # with an engine
    SCORING = "scoring"  # with the reward pool
    READY = "ready"  # may be trained on
    FILTERED = "filtered"  # no variance: dynamic sampling leaves it out
    FAILED = "failed"  # given up after the last attempt


@dataclass
class Sample:
    """One response."""

    token_ids: np.ndarray  # int32 [response tokens]
    log_probs: np.ndarray  # float32 [response tokens], the engine's; NaN where it was not asked for them
    finish_reason: str
    versions: list[VersionSpan]
    text: str = ""  # without special tokens
    raw_text: str = ""  # with all but the one that ended it
    reward: RewardResult | None = None
    mask: np.ndarray | None = (
        None  # bool [response tokens], False where an agent observed; None: the engine sampled all
    )
    turns: int = 0  # of an agent's episode; 0: no agent

    @property
    def sampled(self) -> np.ndarray:
        """The tokens that the policy chose: bool `[response tokens]`."""
        return np.ones(len(self.token_ids), dtype=bool) if self.mask is None else self.mask

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.versions)


@dataclass
class Group:
    """The samples of one prompt. `order` counts admissions from 0 over the coordinator's life."""

    order: int
    prompt: Prompt
    state: GroupState = GroupState.WAITING
    attempts: int = 0  # that it spoiled itself
    misfortunes: list[str] = field(default_factory=list)  # engines that died, or did not finish, with it and others
    samples: list[Sample] = field(default_factory=list)
    failure: str = ""

    @property
    def uid(self) -> str:
        return self.prompt.uid

    @property
    def done(self) -> bool:
        return self.state in (GroupState.READY, GroupState.FILTERED, GroupState.FAILED)

    @property
    def oldest_version(self) -> int:
        return min(sample.oldest_version for sample in self.samples)

    def restart(self) -> None:
        """Back to the queue: its samples are thrown away."""
        self.state, self.samples = GroupState.WAITING, []
