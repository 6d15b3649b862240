"""From a configuration to a tokenizer and loaders."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from configs.errors import ConfigError
from data.build import Supply, Tasks
from data.config import DataConfig, Shape, SourceConfig
from data.corpus import Corpus
from data.files import hashed
from data.loader import Loader
from data.order import Stream
from data.reading import read
from data.shards import document_key, read_manifest, shard_path
from data.sources import Listing, Say, Unit, find_units, key_of
from data.tokenizer import Tokenizer, open_tokenizer

BPE_BYTES = 32 << 20  # text that a BPE is trained on; more hardly changes it


@dataclass(frozen=True)
class Prepared:
    """What is known before a shard is there: listings by source, the tokenizer, and where every unit's shard
    is or will be, in the order in which training needs them."""

    sources: dict[str, SourceConfig]
    listings: dict[str, Listing]
    tokenizer: Tokenizer
    tasks: Tasks

    def summary(self) -> dict[str, int | float]:
        """documents, tokens and bytes (of text) of the shards that are there, shards (all), shards_ready,
        source_bytes (on disk) and ignored_files (of unknown kind)."""
        manifests = [manifest for path in self.tasks if (manifest := read_manifest(path))]
        places = {hashed(listing.units): listing for listing in self.listings.values()}.values()
        return {
            "documents": sum(manifest.documents for manifest in manifests),
            "tokens": sum(manifest.tokens for manifest in manifests),
            "bytes": sum(manifest.bytes for manifest in manifests),
            "shards": len(self.tasks),
            "shards_ready": len(manifests),
            "source_bytes": sum(listing.source_bytes for listing in places),
            "ignored_files": sum(listing.ignored_files for listing in places),
        }


def prepare(config: DataConfig, *, say: Say, quiet: bool = False) -> Prepared:
    """List the sources and open the tokenizer, training it where needed. Raises ConfigError."""
    cache = Path(config.cache_dir).expanduser()
    try:
        (cache / "shards").mkdir(parents=True, exist_ok=True)
        (cache / "lock").touch()
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {cache} cannot be made or written: {error.strerror}; choose another"
        ) from error
    sources = config.chosen()
    status = Console(stderr=True, quiet=quiet or not sys.stderr.isatty()).status("looking for text")
    with FileLock(cache / "lock"), status:
        listings = {name: find_units(name, source, config, say) for name, source in sources.items()}
        status.update("preparing the tokenizer")
        units = sorted({unit for listing in listings.values() for unit in listing.units}, key=fingerprint)
        source = hashed([unit.fingerprint for unit in units], config.validation_fraction, BPE_BYTES)
        tokenizer = open_tokenizer(config.tokenizer, cache, source, training_texts(units, config, say))
    for name, chosen in sources.items():
        if chosen.fim_rate and tokenizer.fim is None:
            raise ConfigError(
                f"{key_of(name)}: fim_rate {chosen.fim_rate} needs fill-in-the-middle marks;"
                " this tokenizer has none: set data.fim_rate=0"
            )
    tasks = {shard_path(unit, tokenizer, cache): unit for unit in by_need(sources, listings)}
    return Prepared(sources, listings, tokenizer, tasks)


def fingerprint(unit: Unit) -> str:
    return unit.fingerprint


def by_need(sources: dict[str, SourceConfig], listings: dict[str, Listing]) -> Iterator[Unit]:
    """All units, those first that a mixture with these weights meets first."""
    due: list[tuple[float, Unit]] = []
    for name, listing in listings.items():
        used = 0
        for unit in listing.units:
            due.append((used / max(sources[name].weight, 1e-9), unit))
            used += max(1, unit.size)
    yield from dict.fromkeys(unit for _, unit in sorted(due, key=lambda item: item[0]))


def training_texts(units: list[Unit], config: DataConfig, say: Say) -> Iterator[str]:
    """Documents that are not held out, up to BPE_BYTES characters: of the units in the order of their hashes,
    so of every source about its share of the bytes."""
    threshold = int(config.validation_fraction * 2**64)
    left = BPE_BYTES
    for unit in units:
        for batch in read(unit, minutes=config.patience_minutes, say=say):
            for text in batch:
                if document_key(text) >= threshold:
                    yield text
                    left -= len(text)
            if left < 0:
                return


@dataclass(frozen=True)
class Data:
    """What a run needs. ``summary``: that of Prepared, and seconds (to open). ``close`` ends what makes
    shards beside the training."""

    tokenizer: Tokenizer
    train: Loader
    valid: Loader
    summary: dict[str, int | float]
    close: Callable[[], None]


def open_data(
    config: DataConfig,
    plan: Callable[[int], Shape],
    *,
    mtp_depth: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    builder: bool = True,
    say: Say | None = None,
) -> Data:
    """The tokenizer and loaders of the configured sources; `plan` says what each step's batch is made of.

    Shards that are missing are made first, or with `config.shuffle_shards` beside the training, by the
    `builder` process of this machine. Validation does not depend on `seed`. `say` is told what a person
    should know, such as a server that does not answer. Raises ConfigError.
    """
    began = time.perf_counter()
    say = say or (lambda text: print(f"warning: {text}", file=sys.stderr, flush=True))
    prepared = prepare(config, say=say if builder else ignore, quiet=rank > 0)
    cache = Path(config.cache_dir).expanduser()
    supply = Supply(prepared.tasks, prepared.tokenizer, config, cache, builder=builder, say=say)
    beside = config.shuffle_shards is not None
    if beside:
        supply.start()
    else:
        supply.make_all(progress=rank == 0 and sys.stderr.isatty())
    streams: dict[bool, dict[str, Stream]] = {False: {}, True: {}}
    for name, source in prepared.sources.items():
        corpus = Corpus(
            name,
            prepared.listings[name].units,
            supply.shard,
            source,
            validation_fraction=config.validation_fraction,
            shuffle_shards=config.shuffle_shards,
        )
        streams[False][name] = Stream(corpus, seed=seed, fim_rate=source.fim_rate or 0.0)
        if source.weight:
            streams[True][name] = Stream(corpus, seed=0, held_out=True)

    def loader(held_out: bool, seed: int) -> Loader:
        return Loader(
            streams[held_out],
            plan,
            prepared.tokenizer,
            seed=seed,
            mtp_depth=mtp_depth,
            rank=rank,
            world=world,
            on_change=config.on_change,
        )

    if not beside:  # what has no document fails here rather than at the first batch
        for stream in (*streams[False].values(), *streams[True].values()):
            stream.check()
    summary = prepared.summary() | {"seconds": time.perf_counter() - began}
    return Data(prepared.tokenizer, loader(False, seed), loader(True, 0), summary, supply.close)


def ignore(_: str) -> None:
    """Another process of this machine says it."""
