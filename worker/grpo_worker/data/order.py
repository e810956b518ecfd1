"""The order of the rows, a pure function of (seed, epoch) and the kept rows.

Invariant: the same seed and epoch give the same order on every machine, Python and NumPy version. NumPy guarantees the
raw stream of a bit generator for ever but not the methods of `Generator` (NEP 19), so a permutation is the stable
argsort of raw Philox words.

All rows of all files are one sequence, and an epoch is one permutation of it: files are mixed whatever wrote them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Which permutation a stream is for. SeedSequence pads its entropy with zeros, so [seed, epoch] and [seed, epoch, 0]
# would be one stream: each kind has its own non-zero word.
_ROWS, _FILE = 2, 3

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


def epoch_order(kept: npt.NDArray[np.bool_], *, seed: int, epoch: int, shuffle: bool) -> Indices:
    """The kept rows in the order of an epoch, int64 [kept].

    Args:
        kept: which of all rows are used, bool [rows].
    """
    rows = permutation(len(kept), (seed, epoch, _ROWS, 0)) if shuffle else np.arange(len(kept), dtype=np.int64)
    return rows[kept[rows]]
