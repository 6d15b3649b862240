"""Batches: the global stream of sequences, dealt to ranks, one batch prepared ahead."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console

from configs.errors import ConfigError
from data.config import DataConfig
from data.files import hashed
from data.order import Order
from data.packing import assemble, tokens_of
from data.shards import Documents, document_key, open_shards
from data.sources import Unit, find_units, read
from data.tokenizer import Tokenizer, open_tokenizer

BPE_BYTES = 32 << 20  # text that a BPE is trained on; more hardly changes it
Batch = dict[str, torch.Tensor]


def deal(costs: list[int], world: int) -> list[list[int]]:
    """Indices for each rank: by falling cost, from rank 0 up and from the last down in turn, so that ranks
    carry about the same, and so do their first rows, their second rows and so on."""
    hands: list[list[int]] = [[] for _ in range(world)]
    for turn, index in enumerate(sorted(range(len(costs)), key=lambda i: -costs[i])):
        lap, seat = divmod(turn, world)
        hands[seat if lap % 2 == 0 else world - 1 - seat].append(index)
    return hands


class Loader:
    """One rank's share of the stream. Every rank plans every batch and reads only its own rows."""

    def __init__(
        self,
        documents: Documents,
        order: Order,
        tokenizer: Tokenizer,
        *,
        seed: int,
        mtp_depth: int,
        rank: int = 0,
        world: int = 1,
    ):
        self._documents, self._order, self._tokenizer = documents, order, tokenizer
        self._mtp_depth, self._rank, self._world = mtp_depth, rank, world
        self._identity = {
            "seed": seed,
            "seq_len": order.seq_len,
            "fim_rate": order.fim_rate,
            "data": documents.fingerprint,
            "tokenizer": tokenizer.fingerprint,
        }
        self._g = 0  # the next sequence to hand out
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, n_sequences: int) -> Batch:
        """This rank's rows of the next `n_sequences` of the global stream, as int64 CPU tensors: input_ids,
        labels, position_ids, document_ids [B, S] and next_ids [B, S, mtp_depth], with B = ceil(n / world) on
        every rank: one with fewer rows gets rows that are all padding."""
        wanted = (self._g, n_sequences)
        if self._ahead is None or self._ahead[0] != wanted:
            self._ahead = (wanted, self._worker.submit(self._build, *wanted))
        batch = self._ahead[1].result()
        self._g += n_sequences
        following = (self._g, n_sequences)
        self._ahead = (following, self._worker.submit(self._build, *following))
        return batch

    def one_pass(self, n_sequences: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches of the first epoch from its beginning, `limit` sequences at most, the last one filled with
        padding: always the same, and without moving the stream."""
        total = self._worker.submit(self._order.first_epoch).result()
        total = total if limit is None else min(limit, total)
        for g in range(0, total, n_sequences):
            yield self._worker.submit(self._build, g, n_sequences, total).result()

    def state_dict(self) -> dict:
        """Where the stream stands after the batches handed out; the same for every rank and world size."""
        return {
            **self._identity,
            "g": self._g,
            "mark": list(self._worker.submit(self._order.mark, self._g).result()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue a stream. Raises ConfigError if it was another one."""
        for key, mine in self._identity.items():
            if state.get(key) != mine:
                raise ConfigError(
                    f"data: the checkpoint was written with another {key} ({state.get(key)}, here {mine});"
                    f" restore that {key}, or start a new run"
                )
        first, epoch, window = state["mark"]
        self._worker.submit(self._order.start_from, (first, epoch, window)).result()
        self._g = state["g"]

    def _build(self, g: int, n_sequences: int, stop: int | None = None) -> Batch:
        """Sequences g, g + 1, ... before `stop`. Runs on the worker thread alone, which owns the order."""
        last = g + n_sequences if stop is None else min(g + n_sequences, stop)
        sequences = [self._order.sequence(i) for i in range(g, last)]
        hand = deal([sum(piece.length**2 for piece in s) for s in sequences], self._world)[self._rank]
        rows = [[tokens_of(p, self._documents, self._tokenizer.fim) for p in sequences[i]] for i in hand]
        rows += [[] for _ in range(-(-n_sequences // self._world) - len(rows))]
        arrays = assemble(
            rows, seq_len=self._order.seq_len, mtp_depth=self._mtp_depth, fill=self._tokenizer.eos_id
        )
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class Data:
    """What a run needs. ``summary``: documents, tokens, bytes (of text), shards, train_tokens, valid_tokens,
    source_bytes (on disk; more than ``bytes`` where max_bytes took a part), ignored_files (of unknown kind),
    seconds (to open)."""

    tokenizer: Tokenizer
    train: Loader
    valid: Loader
    summary: dict[str, int | float]


def open_data(
    config: DataConfig, *, seq_len: int, mtp_depth: int, seed: int, rank: int = 0, world: int = 1
) -> Data:
    """The tokenizer and loaders of a configured source. The first call for a source tokenizes it, later ones
    find it in `config.cache_dir`. Validation does not depend on `seed`. Raises ConfigError."""
    began = time.perf_counter()
    cache = Path(config.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {cache} cannot be made: {error.strerror}; choose another"
        ) from error
    units, found = find_units(config)
    with (
        FileLock(cache / "lock"),
        Console(stderr=True, quiet=rank > 0 or not sys.stderr.isatty()).status("preparing the tokenizer"),
    ):
        source = hashed([unit.fingerprint for unit in units], config.validation_fraction, BPE_BYTES)
        tokenizer = open_tokenizer(config.tokenizer, cache, source, training_texts(units, config))
    if config.fim_rate and tokenizer.fim is None:
        raise ConfigError(
            f"data.fim_rate: {config.fim_rate} needs fill-in-the-middle marks; this tokenizer has none"
        )
    shards = open_shards(units, tokenizer, cache, progress=rank == 0)
    documents = Documents(shards)
    held_out = held_out_mask(documents.keys, config)

    def loader(mask: np.ndarray, seed: int, fim_rate: float, name: str) -> Loader:
        chosen = documents.choose(mask)
        order = Order(chosen.lengths, seed=seed, seq_len=seq_len, fim_rate=fim_rate, name=name)
        return Loader(chosen, order, tokenizer, seed=seed, mtp_depth=mtp_depth, rank=rank, world=world)

    summary = {
        "documents": len(documents),
        "tokens": int(documents.lengths.sum()),
        "bytes": sum(manifest.bytes for manifest in shards.values()),
        "shards": len(shards),
        "train_tokens": int(documents.lengths[~held_out].sum()),
        "valid_tokens": int(documents.lengths[held_out].sum()),
        **found,
        "seconds": time.perf_counter() - began,
    }
    train = loader(~held_out, seed, config.fim_rate, "train")
    return Data(tokenizer, train, loader(held_out, 0, 0.0, "valid"), summary)


def held_out_mask(keys: np.ndarray, config: DataConfig) -> np.ndarray:
    """Which documents are for validation: those whose key falls into the first `validation_fraction` of all
    keys, or the nearest one where that would leave a side empty."""
    if len(np.unique(keys)) < 2:
        where = config.path or "the built-in source"
        raise ConfigError(
            f"data.path: {where} holds fewer than two different documents; add text to hold out"
        )
    threshold = np.uint64(int(config.validation_fraction * 2**64))
    return keys < min(max(threshold, keys.min() + np.uint64(1)), keys.max())


def training_texts(units: list[Unit], config: DataConfig) -> Iterator[str]:
    """Documents that are not held out, up to BPE_BYTES characters, from units in no particular order."""
    threshold = int(config.validation_fraction * 2**64)
    left = BPE_BYTES
    for unit in sorted(units, key=lambda unit: unit.fingerprint):
        for text in (text for batch in read(unit) for text in batch if document_key(text) >= threshold):
            yield text
            left -= len(text)
            if left < 0:
                return
