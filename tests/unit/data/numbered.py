"""A source in memory in which every token has a number of its own: what a stream gives can be counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from data.config import SourceConfig
from data.corpus import Corpus
from data.packing import Piece, tokens_of
from data.tokenizer import FimIds

MARKS = FimIds(begin=2**31, hole=2**31 + 1, end=2**31 + 2)


@dataclass
class NumberedShard:
    """A shard without a file: the tokens of document `row` are numbered from `first[row]` on."""

    lengths: np.ndarray
    keys: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, row: int) -> np.ndarray:
        return np.arange(self.first[row], self.first[row] + self.lengths[row], dtype=np.uint32)


def numbered_shards(lengths: Sequence[Sequence[int]], keys: Sequence[Sequence[int]] | None = None) -> list:
    """Shards of documents of these lengths (with the end mark); `keys` are random where none are given."""
    draw = np.random.default_rng(7)
    shards, at = [], 0
    for number, these in enumerate(lengths):
        own = draw.integers(0, 2**64, len(these), np.uint64) if keys is None else keys[number]
        ends = at + np.cumsum(np.array(these, np.int64))
        shards.append(NumberedShard(np.array(these, np.uint32), np.array(own, np.uint64), ends - these))
        at += sum(these)
    return shards


def numbered_corpus(
    shards: list[NumberedShard],
    name: str = "web",
    *,
    shuffle_shards: int | None = None,
    validation_fraction: float = 0.1,
    **filters,
) -> Corpus:
    """A source made of these shards, as if each were a unit's."""
    units: list[Any] = [
        SimpleNamespace(fingerprint=f"{name} {n} {len(s)}", n=n) for n, s in enumerate(shards)
    ]

    def shard(unit: Any) -> Any:
        return shards[unit.n]

    return Corpus(
        name,
        units,
        shard,
        SourceConfig(files=["memory"], **filters),
        validation_fraction=validation_fraction,
        shuffle_shards=shuffle_shards,
    )


def numbers_of(shards: list[NumberedShard], used: list[np.ndarray]) -> list[int]:
    """Every token of the documents that are used, in order; `used` holds a mask for each shard."""
    rows = [(s, row) for s, mask in zip(shards, used, strict=True) for row in np.flatnonzero(mask).tolist()]
    return [int(number) for shard, row in rows for number in shard.tokens(row)]


def numbers_in(pieces: Sequence[Piece]) -> list[int]:
    """The tokens of some pieces, without marks."""
    return [n for piece in pieces for n in tokens_of(piece, MARKS).tolist() if n < MARKS.begin]
