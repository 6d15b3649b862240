"""Which tokens make up sequence g: a pure function of the seed and g, whatever the number of processes."""

from __future__ import annotations

from bisect import bisect_right
from hashlib import blake2b

import numpy as np

from data.packing import FIM_MARKS, Piece, best_fit_decreasing, split_long

WINDOW_TOKENS = 8_000_000  # documents packed together: more wastes time and memory, fewer waste padding
WINDOW_ROWS = 1024  # at least this many rows, so that long rows fill as well
SHORTEST_FIM = 16  # tokens; below that nothing is worth rearranging


def generator(*key: object) -> np.random.Generator:
    """A counter-based generator of its own for every key (Philox, Salmon et al. 2011)."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Order:
    """The endless stream of sequences over some documents.

    Every epoch permutes the documents; windows of consecutive ones are split, packed and their rows permuted.
    Each token of the documents occurs once an epoch. Only lengths are needed.

    Where window w begins depends on the windows before it, so known beginnings are kept: `mark` gives the one
    for g, and an Order that is given it by `start_from` need not plan what came before.
    """

    def __init__(
        self, lengths: np.ndarray, *, seed: int, seq_len: int, fim_rate: float = 0.0, name: str = "train"
    ):
        self.seq_len = seq_len
        self.fim_rate = fim_rate
        self._lengths = lengths
        self._key = (seed, name)
        self._windows = -(-int(lengths.sum()) // max(WINDOW_TOKENS, WINDOW_ROWS * seq_len))
        self._documents_per_window = -(-len(lengths) // self._windows)
        self._windows = -(-len(lengths) // self._documents_per_window)  # rounding may have emptied the last
        self._marks = [(0, 0, 0)]  # (g of the window's first sequence, epoch, window), ascending
        self._plans: dict[tuple[int, int], list[list[Piece]]] = {}
        self._permutations: dict[int, np.ndarray] = {}

    def sequence(self, g: int) -> list[Piece]:
        """The pieces of sequence g, at most seq_len tokens together."""
        first, epoch, window = self.mark(g)
        return self.plan(epoch, window)[g - first]

    def first_epoch(self) -> int:
        """How many sequences the first epoch has."""
        return sum(len(self.plan(0, window)) for window in range(self._windows))

    def mark(self, g: int) -> tuple[int, int, int]:
        """(first g, epoch, number) of the window that holds sequence g."""
        first, epoch, window = self._marks[bisect_right(self._marks, g, key=lambda mark: mark[0]) - 1]
        while g >= (after := first + len(self.plan(epoch, window))):
            first = after
            epoch, window = (epoch, window + 1) if window + 1 < self._windows else (epoch + 1, 0)
            if first > self._marks[-1][0]:
                self._marks.append((first, epoch, window))
        return first, epoch, window

    def start_from(self, mark: tuple[int, int, int]) -> None:
        """Take a mark from an earlier run of the same order."""
        self._marks = sorted({(0, 0, 0), mark})

    def plan(self, epoch: int, window: int) -> list[list[Piece]]:
        """The sequences of one window, a pure function of (seed, epoch, window)."""
        if (epoch, window) not in self._plans:
            while len(self._plans) > 1:  # a batch touches two windows at most
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch, window] = self._planned(epoch, window)
        return self._plans[epoch, window]

    def _planned(self, epoch: int, window: int) -> list[list[Piece]]:
        first = window * self._documents_per_window
        chosen = self._permutation(epoch)[first : first + self._documents_per_window]
        lengths = self._lengths[chosen]

        draw = generator(*self._key, "fim", epoch, window)
        rearrange = draw.random(len(chosen)) < self.fim_rate
        rearrange &= (lengths >= SHORTEST_FIM) & (lengths + FIM_MARKS <= self.seq_len)
        cuts = np.sort(draw.integers(0, lengths[:, None], (len(chosen), 2)), axis=1)  # before the end mark

        index, start, length = split_long(lengths + FIM_MARKS * rearrange, self.seq_len)
        documents = chosen[index].tolist()
        pieces = [Piece(*fields) for fields in zip(documents, start.tolist(), length.tolist(), strict=True)]
        for i in np.flatnonzero(rearrange[index]).tolist():
            a, b = cuts[index[i]].tolist()
            pieces[i] = pieces[i]._replace(cuts=(a, b))
        bins = best_fit_decreasing(length.tolist(), self.seq_len)
        shuffled = generator(*self._key, "rows", epoch, window).permutation(len(bins)).tolist()
        return [[pieces[i] for i in bins[b]] for b in shuffled]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            self._permutations = {
                epoch: generator(*self._key, "documents", epoch).permutation(len(self._lengths))
            }
        return self._permutations[epoch]
