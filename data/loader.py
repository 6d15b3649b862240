"""Batches: the global stream of sequences, dealt to ranks, some prepared ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from configs.errors import ConfigError
from data.config import Shape
from data.order import Cursor, Mixture, Sequence, Stream
from data.packing import assemble, tokens_of
from data.sources import key_of
from data.tokenizer import Tokenizer

FILTERS = ("min_tokens", "max_tokens", "deduplicate")
STATE = 2  # version of `state_dict`
AHEAD = 2  # batches prepared while the model is busy
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Position:
    """Where the global stream stands: the next step, the next sequence `g`, the one at which these weights of
    the mixture began, and every source's cursor."""

    step: int
    g: int
    mixed_from: int
    weights: dict[str, float]
    cursors: dict[str, Cursor]


def deal(costs: list[int], world: int) -> list[list[int]]:
    """Indices for each rank: by falling cost, from rank 0 up and from the last down in turn, so that ranks
    carry about the same, and so do their first rows, their second rows and so on."""
    hands: list[list[int]] = [[] for _ in range(world)]
    for turn, index in enumerate(sorted(range(len(costs)), key=lambda i: -costs[i])):
        lap, seat = divmod(turn, world)
        hands[seat if lap % 2 == 0 else world - 1 - seat].append(index)
    return hands


def by_key(name: str, identity: dict[str, Any]) -> dict[str, Any]:
    """What a source's state says, by the keys of the configuration."""
    source = "data" if key_of(name) == "data.path" else key_of(name)
    found = {f"{source}.{filter}": value for filter, value in zip(FILTERS, identity["filters"])}
    found |= {f"data.{key}": identity[key] for key in ("validation_fraction", "shuffle_shards")}
    found |= {f"{source}.fim_rate": identity["fim_rate"]}
    return {key_of(name) if source == "data" else f"{source}.files": identity["files"]} | found


class Loader:
    """One rank's share of the stream. Every rank plans every batch and reads only its own rows."""

    def __init__(
        self,
        streams: dict[str, Stream],
        plan: Callable[[int], Shape],
        tokenizer: Tokenizer,
        *,
        seed: int,
        mtp_depth: int,
        rank: int = 0,
        world: int = 1,
        on_change: str = "refuse",
    ):
        """`plan` says for every step what its batch is made of."""
        self._streams, self._plan, self._tokenizer = streams, plan, tokenizer
        self._seed, self._mtp_depth, self._rank, self._world = seed, mtp_depth, rank, world
        self._on_change = on_change
        self._weights = {name: stream.corpus.source.weight for name, stream in streams.items()}
        self._mixture = Mixture(self._weights, seed)
        self._mixed = self._weights
        self._start = Position(0, 0, 0, self._weights, dict.fromkeys(streams, Cursor()))
        self._position = self._frontier = self._start  # what was handed out, what was prepared
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: deque[Future[tuple[Batch, Position]]] = deque()
        self.passed_over: tuple[range, ...] = ()  # `load_state_dict` has what is prepared already follow

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources; `one_pass` says by their numbers here where a row comes from."""
        return tuple(self._streams)

    @property
    def step(self) -> int:
        """The step whose batch comes next."""
        return self._position.step

    @property
    def handed_out(self) -> int:
        """Sequences of the global stream before the next step's, those `passed_over` included."""
        return self._position.g

    def batch(self) -> Batch:
        """This rank's rows of the next step, as int64 CPU tensors: input_ids, labels, position_ids,
        document_ids [B, S] and next_ids [B, S, mtp_depth]. B = ceil(sequences / world) on every rank: one
        with fewer rows gets rows that are all padding. In pinned memory where there is a GPU."""
        batch, position = self._prepared(0)
        self._ahead.popleft()
        self._position = position
        return batch

    def later(self, step: int) -> Batch:
        """What `batch` will return for a later step. The stream stays where it is."""
        return self._prepared(step - self.step)[0]

    def _prepared(self, steps: int) -> tuple[Batch, Position]:
        """The batch so many steps after the next one, and where the stream stands after it."""
        while len(self._ahead) <= max(steps, AHEAD):
            self._ahead.append(self._worker.submit(self._next))
        try:
            return self._ahead[steps].result()
        except BaseException:
            self._restart_from(self._position)
            raise

    def one_pass(self, sequences: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches of the first epoch from its beginning, `limit` sequences at most, the last one filled with
        padding: always the same, and without moving the stream. Ends with the first source that ends. Each
        has one tensor more, sources [B]: the number of each row's source, -1 of rows that are padding."""

        def part(position: Position) -> tuple[Batch | None, Position]:
            wanted = sequences if limit is None else min(sequences, limit - position.g)
            found, after = self._draw(position, Shape(wanted, seq_len), epochs=1)
            if not found:
                return None, after
            batch = self._assembled(found, sequences, seq_len)
            names = [self._mixture.source(g - after.mixed_from) for g in range(position.g, after.g)]
            numbers = [self.sources.index(names[i]) for i in self._hand(found)]
            numbers += [-1] * (len(batch["input_ids"]) - len(numbers))
            return batch | {"sources": torch.tensor(numbers)}, after

        position = self._start
        while True:
            batch, position = self._worker.submit(part, position).result()
            if batch is None:
                return
            yield batch

    def text(self, count: int, seq_len: int) -> torch.Tensor:
        """The first `count` tokens of `one_pass` without end marks, [count] int64: the same on all ranks.
        Again from the beginning where there are fewer."""

        def drawn() -> np.ndarray:
            found, position = [np.zeros(0, np.uint32)], self._start
            missing = count
            while missing > 0:
                sequences, position = self._draw(position, Shape(1, seq_len), epochs=1)
                if not sequences:
                    break
                for piece in sequences[0]:
                    ids = tokens_of(piece, self._tokenizer.fim)
                    found.append(ids[ids != self._tokenizer.eos_id])
                    missing -= len(found[-1])
            return np.resize(np.concatenate(found), count)

        return torch.from_numpy(self._worker.submit(drawn).result().astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches handed out; the same for every rank and world size."""
        at = self._position
        return {
            "version": STATE,
            "seed": self._seed,
            "tokenizer": self._tokenizer.fingerprint,
            "step": at.step,
            "g": at.g,
            "mixed_from": at.mixed_from,
            "weights": at.weights,
            "sources": {
                name: {**self._identity(stream), "cursor": at.cursors[name].to_list()}
                for name, stream in self._streams.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stream. Raises ConfigError if it was another one, or, with on_change=restart, begins the
        sources anew that are others."""
        if state.get("version") != STATE:
            raise ConfigError(
                f"data: the checkpoint is of version {state.get('version', 1)}, here {STATE};"
                " export its weights and start a new run, or use the version of Fourfold that wrote it"
            )
        cursors = dict(self._start.cursors)
        changes = self._changes(state)
        if changes and self._on_change == "refuse":
            key, before, now = changes[0]
            raise ConfigError(
                f"{key} is not that of the checkpoint ({before}, here {now}); restore it, start a new run,"
                " or begin what changed anew with data.on_change=restart"
            )
        same_order = not any(key in ("train.seed", "data.tokenizer") for key, *_ in changes)
        for name, stream in self._streams.items():
            kept = state["sources"].get(name, {})
            if same_order and all(kept.get(key) == value for key, value in self._identity(stream).items()):
                cursors[name] = Cursor.from_list(kept["cursor"])
        self._restart_from(
            Position(state["step"], state["g"], state["mixed_from"], state["weights"], cursors)
        )

    def _identity(self, stream: Stream) -> dict[str, Any]:
        """What must be the same for a source to go on where it stood."""
        source, corpus = stream.corpus.source, stream.corpus
        return {
            "files": corpus.fingerprint,
            "filters": [getattr(source, name) for name in FILTERS],
            "fim_rate": source.fim_rate,
            "validation_fraction": corpus.validation_fraction,
            "shuffle_shards": corpus.shuffle_shards,
        }

    def _changes(self, state: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """(key, before, now) of everything that makes this another stream."""
        found: list[tuple[str, Any, Any]] = [("train.seed", state["seed"], self._seed)]
        found += [("data.tokenizer", state["tokenizer"], self._tokenizer.fingerprint)]
        names = [*state["sources"], *(name for name in self._streams if name not in state["sources"])]
        for name in names:
            before = state["sources"].get(name)
            stream = self._streams.get(name)
            now = self._identity(stream) if stream else None
            if before is None or now is None:
                there = ["not there", "there"]
                found.append((f"data.sources.{name}", there[bool(before)], there[bool(now)]))
                continue
            earlier = by_key(name, before)
            found += [(key, earlier.get(key), value) for key, value in by_key(name, now).items()]
        return [(key, before, now) for key, before, now in found if before != now]

    def _restart_from(self, position: Position) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._position = position
        self._worker.submit(setattr, self, "_frontier", position).result()

    def _next(self) -> tuple[Batch, Position]:
        """The batch of the step after those prepared. Runs on the worker thread, which owns the order."""
        shape = self._plan(self._frontier.step)
        sequences, after = self._draw(self._frontier, shape)
        batch = self._assembled(sequences, shape.sequences, shape.seq_len)
        self._frontier = replace(after, step=after.step + 1)
        return batch, self._frontier

    def _draw(
        self, position: Position, shape: Shape, epochs: int | None = None
    ) -> tuple[list[Sequence], Position]:
        """The next sequences of the global stream, and where it stands after them; fewer at the end of
        `epochs` of a source."""
        weights = dict(shape.weights or self._weights)
        if weights != position.weights:
            position = replace(position, mixed_from=position.g, weights=weights)
        if weights != self._mixed:
            self._mixture, self._mixed = Mixture(weights, self._seed), weights
        found: list[Sequence] = []
        cursors, g = dict(position.cursors), position.g
        while len(found) < shape.sequences:
            name = self._mixture.source(g - position.mixed_from)
            stream = self._streams[name]
            cursors[name] = stream.at(cursors[name], shape.seq_len)
            if epochs is not None and cursors[name].epoch >= epochs:
                break
            sequence, cursors[name] = stream.take(cursors[name], shape.seq_len)
            if not any(g in passed for passed in self.passed_over):
                found.append(sequence)
            g += 1
        return found, replace(position, g=g, cursors=cursors)

    def _hand(self, sequences: list[Sequence]) -> list[int]:
        """Which of these sequences are this rank's rows."""
        return deal([sum(piece.length**2 for piece in s) for s in sequences], self._world)[self._rank]

    def _assembled(self, sequences: list[Sequence], count: int, seq_len: int) -> Batch:
        """This rank's rows of `count` sequences, of which the last ones may be missing."""
        hand = self._hand(sequences)
        rows = [[tokens_of(piece, self._tokenizer.fim) for piece in sequences[i]] for i in hand]
        rows += [[] for _ in range(-(-count // self._world) - len(rows))]
        arrays = assemble(rows, seq_len=seq_len, mtp_depth=self._mtp_depth, fill=self._tokenizer.eos_id)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if torch.cuda.is_available():
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors
