"""The order of the rows, a pure function of (seed, epoch) and the kept rows.

Invariant: the same seed and epoch give the same order on every machine, Python and NumPy version. NumPy guarantees the
raw stream of a bit generator for ever but not the methods of `Generator` (NEP 19), so a permutation is the stable
argsort of raw Philox words.

The shuffle is by block: the row groups are shuffled, then the rows within each. That is what lets memory be one row
group. Files written by `grpo data` are shuffled as a whole when written: their row groups are random samples already.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Which permutation a stream is for. SeedSequence pads its entropy with zeros, so [seed, epoch] and [seed, epoch, 0]
# would be one stream: each kind has its own non-zero word.
_BLOCKS, _ROWS, _FILE = 1, 2, 3

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cursor:
    """A place in the data: `position` kept rows of `epoch` lie before it."""

    epoch: int = 0
    position: int = 0


def permutation(length: int, entropy: Sequence[int]) -> Indices:
    """A permutation of range(length) drawn from Philox seeded with these words."""
    words = np.random.Philox(np.random.SeedSequence(list(entropy))).random_raw(length)
    return np.argsort(np.atleast_1d(words), kind="stable").astype(np.int64)


def file_order(length: int, seed: int) -> Indices:
    """The order in which a converter writes its rows."""
    return permutation(length, (seed, 0, _FILE, 0))


def block_order(blocks: int, *, seed: int, epoch: int, shuffle: bool) -> Indices:
    """The order of the row groups in an epoch."""
    return permutation(blocks, (seed, epoch, _BLOCKS, 0)) if shuffle else np.arange(blocks, dtype=np.int64)


def row_order(rows: int, *, seed: int, epoch: int, block: int, shuffle: bool) -> Indices:
    """The order of the rows within a row group in an epoch."""
    return permutation(rows, (seed, epoch, _ROWS, block)) if shuffle else np.arange(rows, dtype=np.int64)


class KeptRows:
    """Which rows of a row group are used: one bit a row."""

    def __init__(self, mask: npt.NDArray[np.bool_]) -> None:
        self._rows = len(mask)
        self._bits = np.packbits(mask)
        self.count = int(mask.sum())

    def mask(self) -> npt.NDArray[np.bool_]:
        return np.unpackbits(self._bits, count=self._rows).astype(np.bool_)

    def tobytes(self) -> bytes:
        return self._bits.tobytes()


def epoch_order(
    kept: Sequence[KeptRows], cursor: Cursor, *, seed: int, shuffle: bool
) -> Iterator[tuple[int, int, Indices]]:
    """What is left of the cursor's epoch: (block, position of its first row here, kept rows in order), block by block.

    Blocks that lie wholly before the cursor are skipped by their counts alone.
    """
    start = 0
    for block in block_order(len(kept), seed=seed, epoch=cursor.epoch, shuffle=shuffle).tolist():
        end = start + kept[block].count
        if end > cursor.position:
            mask = kept[block].mask()
            rows = row_order(len(mask), seed=seed, epoch=cursor.epoch, block=block, shuffle=shuffle)
            skipped = max(0, cursor.position - start)
            yield block, start + skipped, rows[mask[rows]][skipped:]
        start = end
