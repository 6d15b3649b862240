"""One source as the order sees it: groups of shards, and what of their documents is used."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from configs.errors import ConfigError
from data.config import SourceConfig
from data.files import hashed
from data.shards import Documents, Shard
from data.sources import Unit, key_of


def generator(*key: object) -> np.random.Generator:
    """A counter-based generator of its own for every key (Philox, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=int(hashed(*key), 16)))


class Corpus:
    """The documents of one source, for training and held out.

    A document is held out when its key is below a threshold: copies of it are on the same side, and new files
    move no other. `shard` opens a unit's shard, and waits for it where it is still being built.
    """

    def __init__(
        self,
        name: str,
        units: list[Unit],
        shard: Callable[[Unit], Shard],
        source: SourceConfig,
        *,
        validation_fraction: float,
        shuffle_shards: int | None,
    ):
        self.name, self.units, self.source = name, units, source
        self.validation_fraction, self.shuffle_shards = validation_fraction, shuffle_shards
        self.group_size = shuffle_shards or len(units)
        self.fingerprint = hashed("units", [unit.fingerprint for unit in units])
        self._shard = shard
        self._threshold: np.uint64 | None = None
        self._seen = np.zeros(0, np.uint64)  # sorted keys of the units before `_judged`, to find duplicates
        self._judged = 0
        self._first_of_text: list[np.ndarray] = []  # of every judged unit's documents

    def groups(self, seed: int, epoch: int) -> list[np.ndarray]:
        """Unit numbers that are shuffled together. The first epoch takes them as they are listed, by hash:
        training and validation begin with the same shards, whatever the seed."""
        order = np.arange(len(self.units))
        if epoch and self.group_size < len(order):
            order = generator("units", seed, self.name, epoch).permutation(len(order))
        return [order[at : at + self.group_size] for at in range(0, len(order), self.group_size)]

    def documents(self, units: np.ndarray, *, held_out: bool, order: tuple[int, int] = (0, 0)) -> Documents:
        """The documents of some units that training uses, or those held out."""
        shards = [self._shard(self.units[u]) for u in units]
        rows = []
        for number, shard in zip(units.tolist(), shards, strict=True):
            keys = shard.keys
            chosen = (keys < self.threshold()) == held_out
            chosen &= shard.lengths > self.source.min_tokens
            if self.source.max_tokens is not None:
                chosen &= shard.lengths <= self.source.max_tokens + 1
            if self.source.deduplicate:
                self._judge(number + 1)
                chosen &= self._first_of_text[number]
            rows.append(np.flatnonzero(chosen).astype(np.uint32))
        return Documents(shards, rows, order)

    def threshold(self) -> np.uint64:
        """Keys below it are held out: `validation_fraction` of all possible ones, moved where that would
        leave a side of the first group empty. Raises ConfigError when that has fewer than two documents."""
        if self._threshold is None:
            shards = [self._shard(unit) for unit in self.units[: self.group_size]]
            keys = [end for shard in shards if len(shard) for end in (shard.keys.min(), shard.keys.max())]
            if not keys or min(keys) == max(keys):
                raise ConfigError(
                    f"{key_of(self.name)}: holds fewer than two different documents; add text to hold out"
                )
            wanted = np.uint64(int(self.validation_fraction * 2**64))
            self._threshold = min(max(wanted, min(keys) + np.uint64(1)), max(keys))
        return self._threshold

    def _judge(self, stop: int) -> None:
        """Find the first document of every text, in the order of the first epoch, among the first `stop`
        units. A whole group at a time: each time the keys that were seen are merged with the new ones."""
        while self._judged < stop:
            upto = min(len(self.units), self._judged + self.group_size)
            keys = [self._shard(unit).keys for unit in self.units[self._judged : upto]]
            new, first = np.unique(np.concatenate(keys), return_index=True)
            first = first[~np.isin(new, self._seen, assume_unique=True)]
            is_first = np.zeros(sum(map(len, keys)), bool)
            is_first[first] = True
            self._first_of_text += np.split(is_first, np.cumsum([len(k) for k in keys])[:-1])
            self._seen = np.union1d(self._seen, new)
            self._judged = upto
