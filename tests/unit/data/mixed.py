"""Three small sources on disk, each written in letters of its own."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from data.config import DataConfig, Shape, SourceConfig, TokenizerConfig
from data.opening import open_data
from data.tokenizer import train_bpe

ALPHABETS = {"web": "abcdef", "code": "ghijkl", "long": "mnopqr"}
WEIGHTS = {"web": 3.0, "code": 1.5, "long": 1.0}


def write_mixed(home: Path) -> DataConfig:
    """Four files a source, in groups of two shards, which are made. The tokenizer is a file, so that sources
    may change and it does not."""
    draw = random.Random(0)
    everything = []
    for name, letters in ALPHABETS.items():
        (home / name).mkdir(parents=True)
        words = ["".join(draw.choices(letters, k=draw.randrange(1, 7))) for _ in range(200)]
        for part in range(4):
            texts = [" ".join(draw.choices(words, k=draw.choice([1, 4, 20, 60, 300]))) for _ in range(30)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (home / name / f"{part}.jsonl").write_text(lines)
            everything += texts
    (home / "bpe.json").write_text(train_bpe(iter(everything), 400))
    sources = {name: SourceConfig(files=[str(home / name)], weight=w) for name, w in WEIGHTS.items()}
    sources["code"] = replace(sources["code"], fim_rate=0.5)
    sources["long"] = replace(sources["long"], min_tokens=30, deduplicate=True)
    return made(
        DataConfig(
            sources=sources,
            validation_fraction=0.1,
            shuffle_shards=2,
            cache_dir=str(home / "cache"),
            tokenizer=TokenizerConfig("file", str(home / "bpe.json"), 400),
        )
    )


def made(config: DataConfig) -> DataConfig:
    """The same. Its shards are made now, not beside the training: no other process has to start."""
    open_data(replace(config, shuffle_shards=None), lambda step: Shape(1, 64), mtp_depth=0, seed=1)
    return config


def rows(batch: dict[str, torch.Tensor]) -> list[bytes]:
    """Every row of a batch, all tensors of it, without rows that are padding alone."""
    real = (batch["document_ids"] >= 0).any(1)
    return [
        b"".join(batch[k][i].numpy().tobytes() for k in sorted(batch)) for i in torch.nonzero(real).flatten()
    ]
