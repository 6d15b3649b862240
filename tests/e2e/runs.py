"""A model so small that a whole run takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.head_dim=32",
    "model.q_lora_rank=16",
    "model.o_lora_rank=16",
    "model.moe_intermediate_size=16",
    "model.n_routed_experts=4",
    "model.vocab_size=300",
    "model.index_topk=8",
    "train.steps=6",
    "train.seq_len=64",
    "train.micro_batch=2",
    "train.batch_tokens=256",
    "train.eval_every=3",
    "train.eval_tokens=512",
    "train.save_every=3",
    "train.log_every=1",
    "train.sample_tokens=8",
    "optim.warmup_steps=2",
    "optim.decay_fraction=0.5",
]


def options(corpus: Path, runs: Path) -> list[str]:
    """A tiny model on `corpus`, written to `runs`."""
    data = [
        f"data.path={corpus}",
        f"data.cache_dir={corpus.parent / 'cache'}",
        "data.validation_fraction=0.2",
    ]
    return [*SMALL, *data, f"run.dir={runs}"]


def run(corpus: Path, runs: Path, *extra: str, world: int = 1) -> subprocess.CompletedProcess[str]:
    """Train, under torchrun when `world` is more than 1, without the sample at the end."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    )
    return subprocess.run(
        [sys.executable, *launcher, "-m", "train", *options(corpus, runs), "train.sample_tokens=0", *extra],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
