"""What a run trains on. Types and checks of the ``data`` keys; the values live in ``configs/data/``."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.errors import ConfigError

TOKENIZER_KINDS = ("bpe", "deepseek_v4", "file")
SMALLEST_BPE = 256 + 5  # every byte, and bos, eos and the three fill-in-the-middle marks


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
class DataConfig:
    """One source of documents and how to cut it up.

    path: a folder or file of text, JSONL (also .gz) or Parquet; None takes the Python files of the running
        Python's standard library and of torch.
    text_column: the column that holds the text (JSONL and Parquet).
    max_bytes: at most this many bytes of text, always the same ones; None takes everything.
    validation_fraction: share of the documents held out, picked by a hash of their text.
    fim_rate: share of the training documents rearranged for fill-in-the-middle (prefix, suffix, middle).
    cache_dir: where trained tokenizers and tokenized shards are kept; safe to delete.
    """

    path: str | None = None
    text_column: str = "text"
    max_bytes: int | None = None
    validation_fraction: float = 0.02
    fim_rate: float = 0.0
    cache_dir: str = ".cache/data"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        if self.path is not None and not self.path.strip():
            raise ConfigError("data.path: is empty; give a folder or file, or null for the built-in source")
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
        if not self.cache_dir:
            raise ConfigError("data.cache_dir: is empty; give a folder for tokenizers and shards")
