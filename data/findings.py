"""What a run will train on, measured: the shards of each source, their packing, and sequences as text."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.build import Supply
from data.config import DataConfig
from data.corpus import Corpus
from data.opening import prepare
from data.order import Cursor, Mixture, Sequence, Stream
from data.packing import FIM_MARKS, Piece, tokens_of
from data.shards import Manifest, read_manifest, shard_path
from data.sources import Say, Unit
from data.tokenizer import Tokenizer

EDGE = 120  # tokens shown at either end of what has more than three times as many
MOST_DOCUMENTS = 24  # shown of a sequence
MOST_ROWS = 12  # whose packing is drawn, of each source
OCTAVES = 32  # of document lengths

Runs = list[tuple[str, str]]  # (text, kind): text, mark (of the tokenizer), hidden (escaped) or gap


class Stage(NamedTuple):
    """A phase of the run: so many `tokens`, in sequences of `seq_len`, of sources with these weights."""

    name: str
    seq_len: int
    tokens: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Holdings:
    """What there is of a source. ``documents``, ``tokens`` and ``bytes`` (of text) count everything in the
    shards that are ``ready``; ``lengths`` are those of the documents to train on, in tokens with the end
    mark; ``scale`` is the size of all shards, relative to the ready ones."""

    source: str
    weight: float
    shards: int
    ready: int
    scale: float
    documents: int
    tokens: int
    bytes: int
    held_out: int
    lengths: np.ndarray

    @property
    def to_train_on(self) -> int:
        """Tokens of the documents to train on."""
        return int(self.lengths.sum(dtype=np.int64))


class Box(NamedTuple):
    """A document in a sequence, or a part of one that was cut, as so many tokens."""

    tokens: int
    whole: bool


@dataclass(frozen=True)
class Packing:
    """How the first window of a source is packed in a stage. ``share``: of the stage's sequences;
    ``efficiency``: real tokens of all tokens; ``documents``, or parts of them, in a sequence; ``cut``: share
    of the documents that are in several parts; ``rows``: the first sequences."""

    stage: Stage
    source: str
    share: float
    efficiency: float
    documents: float
    cut: float
    rows: list[list[Box]]

    @property
    def taken(self) -> float:
        """Real tokens that the stage takes of the source."""
        return self.stage.tokens * self.share * self.efficiency


class Document(NamedTuple):
    """A document, or a part of one, as text; `marks` say what was done to it."""

    tokens: int
    marks: list[str]
    runs: Runs


class Sample(NamedTuple):
    """A sequence of the run, by its number, from 1: all that is in it, and the first of it as text."""

    number: int
    source: str
    seq_len: int
    boxes: list[Box]
    documents: list[Document]

    @property
    def padding(self) -> int:
        return self.seq_len - sum(box.tokens for box in self.boxes)


@dataclass(frozen=True)
class Findings:
    """All there is to show. ``notes`` say what to know about numbers that are not those of the whole run."""

    stages: list[Stage]
    holdings: list[Holdings]
    packings: list[Packing]
    samples: list[Sample]
    notes: list[str]

    def taken(self, held: Holdings) -> float:
        """Real tokens that the run takes of a source."""
        return sum(packing.taken for packing in self.packings if packing.source == held.source)

    def epochs(self, held: Holdings) -> float:
        """How often the run goes over a source."""
        return self.taken(held) / max(1.0, held.to_train_on * held.scale)


def look(
    config: DataConfig,
    stages: list[Stage],
    *,
    seed: int,
    count: int,
    say: Say,
    first: int = 1,
    progress: bool = False,
) -> Findings:
    """Make the shards that are missing and measure them; `count` sequences are decoded, from number `first`
    on. With `config.shuffle_shards` only a source without any shard gets its first one. Raises ConfigError.
    """
    prepared = prepare(config, say=say)
    cache = Path(config.cache_dir).expanduser()

    def ready(name: str) -> dict[Unit, Manifest]:
        units = prepared.listings[name].units
        paths = {unit: shard_path(unit, prepared.tokenizer, cache) for unit in units}
        return {unit: found for unit, path in paths.items() if (found := read_manifest(path))}

    todo = prepared.tasks
    if config.shuffle_shards is not None:
        lacking = {
            listing.units[0].fingerprint for name, listing in prepared.listings.items() if not ready(name)
        }
        todo = {path: unit for path, unit in todo.items() if unit.fingerprint in lacking}
    Supply(todo, prepared.tokenizer, config, cache, builder=True, say=say).make_all(progress=progress)
    supply = Supply(prepared.tasks, prepared.tokenizer, config, cache, builder=True, say=say)

    streams: dict[str, Stream] = {}
    holdings: list[Holdings] = []
    begun = True
    for name, source in prepared.sources.items():
        units, here = prepared.listings[name].units, ready(name)
        corpus = Corpus(
            name,
            list(here),
            supply.shard,
            source,
            validation_fraction=config.validation_fraction,
            shuffle_shards=config.shuffle_shards,
        )
        streams[name] = Stream(corpus, seed=seed, fim_rate=source.fim_rate or 0.0)
        holdings.append(held(corpus, units, here))
        begun &= list(here)[: corpus.group_size] == units[: corpus.group_size]
    packings = [
        packed(stream, stage, name)
        for stage in stages
        for name, stream in streams.items()
        if stage.weights.get(name)
    ]
    samples = [
        Sample(
            number,
            name,
            seq_len,
            boxes(sequence),
            [document(piece, prepared.tokenizer) for piece in sequence[:MOST_DOCUMENTS]],
        )
        for number, name, seq_len, sequence in islice(
            in_order(streams, stages, seed), first - 1, first - 1 + count
        )
    ]
    return Findings(stages, holdings, packings, samples, notes(holdings, begun))


def notes(holdings: list[Holdings], begun: bool) -> list[str]:
    ready, shards = sum(h.ready for h in holdings), sum(h.shards for h in holdings)
    found = []
    if ready < shards:
        found.append(f"{ready} of {shards} shards are ready and counted; epochs (~) are estimates for all")
    if not begun:
        found.append("the run's first shards are not all ready: its sequences will be others than these")
    return found


def held(corpus: Corpus, units: list[Unit], ready: dict[Unit, Manifest]) -> Holdings:
    """Count a source, one group of shards at a time."""
    lengths, held_out = [], 0
    for group in corpus.groups(0, 0):
        lengths.append(corpus.documents(group, held_out=False).lengths)
        held_out += len(corpus.documents(group, held_out=True))
    return Holdings(
        source=corpus.name,
        weight=corpus.source.weight,
        shards=len(units),
        ready=len(ready),
        scale=sum(unit.limit or unit.size for unit in units) / sum(unit.limit or unit.size for unit in ready),
        documents=sum(manifest.documents for manifest in ready.values()),
        tokens=sum(manifest.tokens for manifest in ready.values()),
        bytes=sum(manifest.bytes for manifest in ready.values()),
        held_out=held_out,
        lengths=np.concatenate(lengths),
    )


def packed(stream: Stream, stage: Stage, name: str) -> Packing:
    """Measure a window of the first epoch."""
    sequences = stream.window(stream.at(Cursor(), stage.seq_len)).sequences
    pieces = [piece for sequence in sequences for piece in sequence]
    return Packing(
        stage,
        name,
        share=stage.weights[name] / sum(stage.weights.values()),
        efficiency=sum(piece.length for piece in pieces) / (len(sequences) * stage.seq_len),
        documents=len(pieces) / len(sequences),
        cut=len({p.number for p in pieces if p.start}) / len({p.number for p in pieces}),
        rows=[boxes(sequence) for sequence in sequences[:MOST_ROWS]],
    )


def in_order(
    streams: dict[str, Stream], stages: list[Stage], seed: int
) -> Iterator[tuple[int, str, int, Sequence]]:
    """The sequences of the run from its first, each with its number, source and length."""
    cursors, g, weights, mixed_from = dict.fromkeys(streams, Cursor()), 0, None, 0
    for stage in stages:
        if stage.weights != weights:
            mixture, weights, mixed_from = Mixture(dict(stage.weights), seed), stage.weights, g
        for _ in range(stage.tokens // stage.seq_len):
            name = mixture.source(g - mixed_from)
            sequence, cursors[name] = streams[name].take(cursors[name], stage.seq_len)
            g += 1
            yield g, name, stage.seq_len, sequence


def size_of(piece: Piece) -> int:
    """Tokens of the document that the piece is of."""
    return int(piece.documents.lengths[piece.number]) + FIM_MARKS * (piece.cuts is not None)


def boxes(sequence: Sequence) -> list[Box]:
    return [Box(piece.length, piece.length == size_of(piece)) for piece in sequence]


def document(piece: Piece, tokenizer: Tokenizer) -> Document:
    """A piece as text, and what was done to its document."""
    marks = ["rearranged for fill-in-the-middle"] if piece.cuts else []
    if piece.length < (size := size_of(piece)):
        marks.append(f"cut: tokens {piece.start + 1:,} to {piece.start + piece.length:,} of {size:,}")
    return Document(piece.length, marks, list(runs(tokens_of(piece, tokenizer.fim), tokenizer)))


def runs(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """The text of the ids. Only a real mark is one here, not one that is spelled out in a document."""
    is_mark = np.isin(ids, [tokenizer.eos_id, tokenizer.bos_id, *(tokenizer.fim or ())])
    for part in np.split(ids, np.flatnonzero(is_mark[1:] != is_mark[:-1]) + 1):
        if is_mark[0]:
            yield tokenizer.decode(part), "mark"
        elif len(part) > 3 * EDGE:
            yield from visible(tokenizer.decode(part[:EDGE]))
            yield f"\n··· {len(part) - 2 * EDGE:,} tokens ···\n", "gap"
            yield from visible(tokenizer.decode(part[-EDGE:]))
        else:
            yield from visible(tokenizer.decode(part))
        is_mark = is_mark[len(part) :]


def visible(text: str) -> Iterator[tuple[str, str]]:
    """The text with everything that has no shape of its own, or moves what has, written as an escape."""
    for plain, characters in groupby(text, has_shape):
        found = "".join(characters)
        yield (found, "text") if plain else (found.encode("unicode_escape").decode(), "hidden")


def has_shape(character: str) -> bool:
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"


def bins(longest: int, per_octave: int) -> np.ndarray:
    """Borders of bins of lengths from 1 to `longest`, even on a logarithmic scale, as whole numbers."""
    borders = np.unique(np.ceil(2 ** (np.arange(OCTAVES * per_octave) / per_octave)))
    return borders[: np.searchsorted(borders, longest, side="right") + 1].astype(np.int64)


def histogram(lengths: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents and tokens in each bin; a length on a border is in the bin that begins there."""
    weights = lengths.astype(np.float64)
    counts = np.histogram(lengths, borders)[0]
    return counts, np.histogram(lengths, borders, weights=weights)[0]
