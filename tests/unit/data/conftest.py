from __future__ import annotations

import random
from pathlib import Path

import pytest

from data.config import DataConfig, TokenizerConfig


def write_texts(folder: Path, count: int, seed: int = 0) -> dict[str, str]:
    """{name: text} of small files of pseudo-words, all different, some long."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["".join(draw.choices("abcdefgh", k=draw.randrange(1, 8))) for _ in range(300)]
    texts = {}
    for i in range(count):
        size = draw.choice([1, 5, 30, 80, 400])
        texts[f"{i:04d}.txt"] = f"{i} " + " ".join(draw.choices(words, k=size)) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    return write_texts(tmp_path / "texts", 120)


@pytest.fixture
def config(tmp_path: Path, texts: dict[str, str]) -> DataConfig:
    """A folder of 120 small files, a BPE of 400 ids, a tenth held out."""
    return DataConfig(
        path=str(tmp_path / "texts"),
        validation_fraction=0.1,
        cache_dir=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(vocab_size=400),
    )
