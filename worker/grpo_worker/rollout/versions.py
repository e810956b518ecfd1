"""Which weights made which token.

Invariant: the spans of a response cover [0, tokens) without gap or overlap, in order. At a swap, between two steps, each running
request's number of tokens is noted (vLLM itself labels tokens from 0.32 on only).
"""

from dataclasses import dataclass, field

from grpo_worker.protocol.messages import VersionSpan

INITIAL_VERSION = -1  # the weights that the engine loaded from the model directory, before the first sync


@dataclass
class VersionTrack:
    """Of one running request: (version, index of the first token that it made), oldest first."""

    changes: list[tuple[int, int]] = field(default_factory=list)

    def swapped(self, version: int, tokens: int) -> None:
        self.changes.append((version, tokens))

    def spans(self, tokens: int) -> list[VersionSpan]:
        starts = [start for _, start in self.changes] + [tokens]
        return [
            VersionSpan(version, start, end)
            for (version, start), end in zip(self.changes, starts[1:], strict=True)
            if start < min(end, tokens)
        ]
