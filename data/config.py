"""What a run trains on. Types and checks of the ``data`` keys; the values live in ``configs/data/``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from configs.errors import ConfigError

TOKENIZER_KINDS = ("bpe", "deepseek_v4", "file")
SMALLEST_BPE = 256 + 5  # every byte, and bos, eos and the three fill-in-the-middle marks
MOST_SOURCES = 32  # of a mixture: its blocks of 1024 sequences are shared out in whole sequences
BUILTIN = "builtin:python"


class Shape(NamedTuple):
    """What the batch of a step is made of. ``weights`` None: those of the sources."""

    sequences: int
    seq_len: int
    weights: Mapping[str, float] | None = None


@dataclass(frozen=True)
class TokenizerConfig:
    """``bpe`` is trained on the run's own text; ``deepseek_v4`` comes with a package; ``file`` is any
    ``tokenizers`` JSON file. ``vocab_size`` is the size a BPE is trained to, and the most ids that the
    other two may have."""

    kind: str = "bpe"
    path: str | None = None
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in TOKENIZER_KINDS:
            raise ConfigError(
                f"data.tokenizer.kind: {self.kind!r} is unknown; use {', '.join(TOKENIZER_KINDS)}"
            )
        if self.kind == "file" and not self.path:
            raise ConfigError("data.tokenizer.path: kind=file needs the path of a tokenizers JSON file")
        if self.kind != "file" and self.path:
            raise ConfigError(
                f"data.tokenizer.path: is read only with data.tokenizer.kind=file, not {self.kind}; remove it"
            )
        if self.kind == "bpe" and self.vocab_size < SMALLEST_BPE:
            raise ConfigError(
                f"data.tokenizer.vocab_size: {self.vocab_size} is too small for a byte-level BPE;"
                f" use {SMALLEST_BPE} or more"
            )


@dataclass(frozen=True)
class SourceConfig:
    """Documents of one kind, and what of them is used.

    files: folders, files, globs, http(s) URLs (with ranges such as {000..013}) or "builtin:python", of text,
        JSONL (also .gz and .zst), Parquet or Arrow.
    dataset, subset, split, revision: instead of files, a dataset of the Hugging Face hub.
    of: instead of both, the name of another source whose documents these are, with other filters and weight.
    text_column: the column that holds the text (not for text files).
    weight: the share of this source in the mixture's tokens, relative to the other sources'.
    min_tokens, max_tokens: shorter and longer documents are left out; the end mark does not count.
    deduplicate: of documents with equal text only the first is used.
    fim_rate: share of the training documents rearranged for fill-in-the-middle; None takes data.fim_rate.
    """

    files: list[str] = field(default_factory=list)
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    of: str | None = None
    text_column: str = "text"
    weight: float = 1.0
    min_tokens: int = 0
    max_tokens: int | None = None
    deduplicate: bool = False
    fim_rate: float | None = None

    def check(self, key: str) -> None:
        """Raise ConfigError, naming `key`.FIELD, where a value is impossible."""
        if sum(map(bool, (self.files, self.dataset, self.of))) != 1:
            raise ConfigError(f"{key}: give one of files, dataset and of")
        if not all(file.strip() for file in self.files):
            raise ConfigError(f"{key}.files: holds an empty name; remove it")
        if self.dataset is None and (self.subset or self.revision):
            raise ConfigError(f"{key}: subset and revision are of a dataset; give dataset=OWNER/NAME")
        if not self.text_column:
            raise ConfigError(f"{key}.text_column: is empty; name the column that holds the text")
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"{key}.weight: {self.weight} must be a finite number, 0 or more")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens)):
            raise ConfigError(
                f"{key}: min_tokens={self.min_tokens} and max_tokens={self.max_tokens} leave none"
            )
        if self.fim_rate is not None and not 0 <= self.fim_rate <= 1:
            raise ConfigError(f"{key}.fim_rate: {self.fim_rate} must lie in [0, 1]")


@dataclass(frozen=True)
class DataConfig:
    """Sources of documents, and how they are cut up.

    path: one source of one's own, in place of `sources`: a folder, file, glob or URL.
    text_column: the column of `path` that holds the text (not for text files).
    sources: the mixture, by name.
    max_bytes: at most this many bytes of text of each source, always the same ones; None takes everything.
    validation_fraction: share of the documents held out, picked by a hash of their text.
    fim_rate: share of the training documents rearranged for fill-in-the-middle (prefix, suffix, middle).
    shuffle_shards: so many shards are shuffled together, and training starts when the first so many are
        tokenized; None tokenizes everything first and shuffles all of it.
    workers: processes that tokenize; None takes one for each core, fewer for little text.
    patience_minutes: how long a server that does not answer is waited for.
    on_change: what to do with a checkpoint of other data: "refuse", or "restart" the sources that changed.
    cache_dir: where trained tokenizers and tokenized shards are kept; safe to delete.
    """

    path: str | None = None
    text_column: str = "text"
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    max_bytes: int | None = None
    validation_fraction: float = 0.02
    fim_rate: float = 0.0
    shuffle_shards: int | None = None
    workers: int | None = None
    patience_minutes: float = 30.0
    on_change: str = "refuse"
    cache_dir: str = ".cache/data"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        if self.path is not None and not self.path.strip():
            raise ConfigError("data.path: is empty; give a folder or file, or null for data.sources")
        if not self.text_column:
            raise ConfigError("data.text_column: is empty; name the column that holds the text")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise ConfigError(f"data.max_bytes: {self.max_bytes} must be positive, or null for everything")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"data.validation_fraction: {self.validation_fraction} must lie between 0 and 1"
            )
        if not 0 <= self.fim_rate <= 1:
            raise ConfigError(f"data.fim_rate: {self.fim_rate} must lie in [0, 1]")
        for key in ("shuffle_shards", "workers"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"data.{key}: {value} must be 1 or more, or null")
        if not 0 <= self.patience_minutes < math.inf:
            raise ConfigError(f"data.patience_minutes: {self.patience_minutes} must be 0 or more")
        if self.on_change not in ("refuse", "restart"):
            raise ConfigError(f"data.on_change: {self.on_change!r} is unknown; use refuse or restart")
        if not self.cache_dir:
            raise ConfigError("data.cache_dir: is empty; give a folder for tokenizers and shards")
        self._check_sources()

    def _check_sources(self) -> None:
        if len(self.sources) > MOST_SOURCES:
            raise ConfigError(
                f"data.sources: {len(self.sources)} are too many; join some, up to {MOST_SOURCES}"
            )
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}")
            base = self.sources.get(source.of) if source.of else source
            if base is None or base.of:
                others = [other for other, it in self.sources.items() if not it.of]
                raise ConfigError(
                    f"data.sources.{name}.of: {source.of!r} has no documents of its own;"
                    f" choose one of {', '.join(others) or 'none'}"
                )
        if self.sources and not any(source.weight for source in self.sources.values()):
            raise ConfigError("data.sources: all weights are 0; give one of them a weight")

    def chosen(self) -> dict[str, SourceConfig]:
        """The sources in use, complete: those that are `of` another have its documents, and every one has
        its fim_rate. Raises ConfigError without any."""
        if self.path is not None:
            path = os.path.expanduser(self.path)
            own = SourceConfig(files=[path], text_column=self.text_column, fim_rate=self.fim_rate)
            return {"text": own}
        if not self.sources:
            raise ConfigError("data: there is no source; give data.path, or choose a data=... with sources")
        found = {}
        for name, source in self.sources.items():
            base = self.sources[source.of] if source.of else source
            places = ("files", "dataset", "subset", "split", "revision", "text_column")
            fim_rate = self.fim_rate if source.fim_rate is None else source.fim_rate
            place = {key: getattr(base, key) for key in places}
            found[name] = replace(source, of=None, fim_rate=fim_rate, **place)
        return found
