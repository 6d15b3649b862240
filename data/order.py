"""Which tokens make up a sequence: a pure function of the seed and of where the stream stands.

A source's shards are put in groups; every epoch permutes the documents of each group; windows of consecutive
documents are split, packed and their rows permuted. World size and workers never enter.
"""

from __future__ import annotations

from itertools import repeat
from typing import NamedTuple

import numpy as np

from configs.errors import ConfigError
from data.corpus import Corpus, generator
from data.packing import FIM_MARKS, Piece, best_fit_decreasing, joined_pieces, split_long
from data.shards import Documents
from data.sources import key_of

WINDOW_TOKENS = 8_000_000  # documents packed together: more wastes time and memory, fewer waste padding
WINDOW_ROWS = 1024  # at least this many rows, so that long rows fill as well
WINDOW_DOCUMENTS = 32_768  # of short ones fewer tokens pack as well
LARGEST_WINDOW = 256_000_000  # tokens; at a million tokens a row, 1024 rows would take a minute to plan
SHORTEST_FIM = 16  # tokens; below that nothing is worth rearranging
BLOCK = 1024  # sequences in which a mixture's shares are exact
ROUNDS = 6  # of the Feistel network

Sequence = list[Piece]


class Cursor(NamedTuple):
    """Where a stream stands: `taken` sequences of the window that begins at document `start` (of the permuted
    ones of a group) are handed out. `rest`: the cursor of the window that `seq_len` changed in, whose other
    documents are the first of this window."""

    epoch: int = 0
    group: int = 0
    start: int = 0
    seq_len: int = 0
    taken: int = 0
    rest: Cursor | None = None

    def to_list(self) -> list:
        """For JSON."""
        return [*self[:-1], self.rest.to_list() if self.rest else None]

    @staticmethod
    def from_list(values: list) -> Cursor:
        """What `to_list` gave."""
        epoch, group, start, seq_len, taken, rest = values
        return Cursor(epoch, group, start, seq_len, taken, Cursor.from_list(rest) if rest else None)


class Window(NamedTuple):
    """The sequences of one window, and where the next one begins."""

    sequences: list[Sequence]
    epoch: int
    group: int
    start: int


class Stream:
    """The endless stream of sequences over one side of a corpus. Each token occurs once an epoch, and a
    change of `seq_len` neither loses nor repeats one. Only lengths are needed."""

    def __init__(self, corpus: Corpus, *, seed: int, held_out: bool = False, fim_rate: float = 0.0):
        self.corpus = corpus
        self._seed, self._held_out, self._fim_rate = seed, held_out, fim_rate
        self._name = f"{corpus.name} {'valid' if held_out else 'train'}"
        self._windows: dict[Cursor, Window] = {}
        self._documents: dict[tuple[int, int], Documents] = {}

    def take(self, cursor: Cursor, seq_len: int) -> tuple[Sequence, Cursor]:
        """The next sequence, of at most `seq_len` tokens, and where the stream stands after it."""
        cursor = self.at(cursor, seq_len)
        window = self.window(cursor)
        return window.sequences[cursor.taken], cursor._replace(taken=cursor.taken + 1)

    def at(self, cursor: Cursor, seq_len: int) -> Cursor:
        """The same place in a window of this length that has a sequence left."""
        if cursor.seq_len not in (0, seq_len):
            window = self.window(cursor)
            used_up = cursor.taken == len(window.sequences)
            if cursor.taken:
                rest = None if used_up else cursor
                cursor = Cursor(window.epoch, window.group, window.start, seq_len, 0, rest)
        cursor = cursor._replace(seq_len=seq_len)
        began = cursor.epoch
        while cursor.taken == len((window := self.window(cursor)).sequences):
            if window.epoch > began + 1:
                raise self._empty()
            cursor = Cursor(window.epoch, window.group, window.start, seq_len)
        return cursor

    def check(self) -> None:
        """Raise ConfigError if the first group, which may be all, has no document."""
        if self.corpus.source.weight and not len(self.documents(0, 0)):
            raise self._empty()

    def _empty(self) -> ConfigError:
        side = "to hold out" if self._held_out else "to train on"
        return ConfigError(
            f"{key_of(self.corpus.name)}: no document is left {side} after filters; widen them"
        )

    def window(self, cursor: Cursor) -> Window:
        """The window of a cursor, whatever it has taken."""
        key = cursor._replace(taken=0)
        if key not in self._windows:
            while len(self._windows) > 1:  # a batch touches two windows at most
                self._windows.pop(next(iter(self._windows)))
            self._windows[key] = self._planned(key)
        return self._windows[key]

    def _planned(self, cursor: Cursor) -> Window:
        pieces: list[Piece] = []
        if cursor.rest:
            left = self.window(cursor.rest).sequences[cursor.rest.taken :]
            pieces = joined_pieces([piece for sequence in left for piece in sequence], cursor.seq_len)
        epoch, group, start = cursor[:3]
        documents = self.documents(epoch, group)
        stop = self._window_end(documents, start, cursor.seq_len)
        pieces += self._fresh(documents, start, stop, cursor.seq_len)
        bins = best_fit_decreasing([piece.length for piece in pieces], cursor.seq_len)
        draw = generator(self._seed, self._name, "rows", *cursor.to_list())
        sequences = [[pieces[i] for i in bins[b]] for b in draw.permutation(len(bins)).tolist()]
        if stop < len(documents):
            return Window(sequences, epoch, group, stop)
        if group + 1 < len(self.corpus.groups(self._seed, epoch)):
            return Window(sequences, epoch, group + 1, 0)
        return Window(sequences, epoch + 1, 0, 0)

    def documents(self, epoch: int, group: int) -> Documents:
        """The documents of a group."""
        key = (epoch, group)
        if key not in self._documents:
            units = self.corpus.groups(self._seed, epoch)[group]
            same = [d for d in self._documents.values() if len(units) == len(self.corpus.units)]
            while len(self._documents) > 1:
                self._documents.pop(next(iter(self._documents)))
            self._documents[key] = (
                same[0].again(key)
                if same
                else self.corpus.documents(units, held_out=self._held_out, order=key)
            )
        return self._documents[key]

    def _window_end(self, documents: Documents, start: int, seq_len: int) -> int:
        """Windows of a group are of about one size: a small last one would waste padding."""
        if not len(documents):
            return 0
        tokens = min(max(WINDOW_TOKENS, WINDOW_ROWS * seq_len), max(LARGEST_WINDOW, seq_len))
        size = min(WINDOW_DOCUMENTS, tokens * len(documents) / documents.tokens)
        left = len(documents) - start
        windows = max(1, round(left / size))
        return start + -(-left // windows)

    def _fresh(self, documents: Documents, start: int, stop: int, seq_len: int) -> list[Piece]:
        """The documents at some places of the permutation, some of them rearranged, cut to `seq_len`."""
        key = (self._seed, self._name, *documents.order)
        chosen = permuted(np.arange(start, stop), len(documents), *key)
        lengths = documents.lengths[chosen].astype(np.int64)
        draw = generator(*key, "fim", start)
        rearrange = draw.random(len(chosen)) < self._fim_rate
        rearrange &= (lengths >= SHORTEST_FIM) & (lengths + FIM_MARKS <= seq_len)
        cuts = np.sort(draw.integers(0, lengths[:, None], (len(chosen), 2)), axis=1)  # before the end mark
        index, begin, length = split_long(lengths + FIM_MARKS * rearrange, seq_len)
        numbers = (chosen[index].tolist(), begin.tolist(), length.tolist())
        pieces = list(map(Piece._make, zip(repeat(documents), *numbers, repeat(None))))
        for i in np.flatnonzero(rearrange[index]).tolist():
            a, b = cuts[index[i]].tolist()
            pieces[i] = pieces[i]._replace(cuts=(a, b))
        return pieces


def permuted(places: np.ndarray, count: int, *key: object) -> np.ndarray:
    """Which of `count` things is at each place of a pseudo-random permutation, [len(places)] int64.

    A Feistel network on the smallest square power of two that holds `count`, walked until it stays inside
    (Black and Rogaway 2002): any part of a permutation of 1e9 documents in no memory but its own.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = generator("permutation", *key).integers(0, 2**64, ROUNDS, dtype=np.uint64)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for k in keys:
            left, right = right, left ^ (mixed(right + k) & mask)
        return (left << half) | right

    found = network(places.astype(np.uint64))
    while len(outside := np.flatnonzero(found >= count)):
        found[outside] = network(found[outside])
    return found.astype(np.int64)


def mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of uint64 numbers into every other (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Mixture:
    """Which source each sequence comes from: in every block of BLOCK sequences each source has its share, to
    the sequence, and over many blocks its weight exactly."""

    def __init__(self, weights: dict[str, float], seed: int):
        total = sum(weights.values())
        self._names = sorted(weights, key=lambda name: (-weights[name], name))
        self._shares = [weights[name] / total for name in self._names]
        self._seed = seed
        self._block: tuple[int, list[str]] = (-1, [])

    def source(self, n: int) -> str:
        """The source of the n-th sequence."""
        block, at = divmod(n, BLOCK)
        if self._block[0] != block:
            deck = np.repeat(np.arange(len(self._names)), self.quotas(block))
            dealt = generator("mixture", self._seed, block).permutation(deck)
            self._block = (block, [self._names[i] for i in dealt])
        return self._block[1][at]

    def quotas(self, block: int) -> list[int]:
        """Sequences of each source in a block, heaviest source first: it takes what rounding leaves over."""
        others = [int(share * (block + 1) * BLOCK) - int(share * block * BLOCK) for share in self._shares[1:]]
        return [BLOCK - sum(others), *others]
