"""Which weights made which token.

Invariant: the spans of a response cover [0, tokens) without gap or overlap, in order. vLLM 0.32 and later report them;
for older ones we note, while generation stands still for a swap, how many tokens each running request has.
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


def version_of_tag(tag: str) -> int:
    """vLLM labels weights with strings; ours are decimal versions, and its own label is what it started with."""
    return int(tag) if tag.lstrip("-").isdigit() else INITIAL_VERSION
