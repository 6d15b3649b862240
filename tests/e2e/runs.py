"""A model so small that a whole run takes seconds."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.distributed.ranks import fork

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.num_hidden_layers=3",
    "model.layer_types=[sliding_attention,compressed_sparse_attention,heavily_compressed_attention]",
    "model.mlp_layer_types=[hash_moe,moe,moe]",
    "model.hc_sinkhorn_iters=2",
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


class Ended(NamedTuple):
    """How a run ended: its exit code, negative for a signal; what it printed; whether processes were left."""

    returncode: int | None
    stdout: str
    stderr: str
    left: bool


class Job:
    """`python -m train ARGV` in a fork of a process that has imported everything; if `world` is more than 1,
    torchrun's agent, and in forks of it the ranks. Each calls `setup` first."""

    def __init__(self, argv: list[str], world: int = 1, setup: Callable[[], object] = int):
        self._folder = TemporaryDirectory()
        self._streams = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self._process = fork(_carry_out, argv, world, setup, self._streams, daemon=False)

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> bool:
        """All its processes at once; False if there are none."""
        assert self._process.pid
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def end(self, timeout: float = 300) -> Ended:
        """Wait for it, at most so many seconds."""
        self._process.join(timeout)
        left = self.kill()
        self._process.join()
        out, err = (stream.read_text() for stream in self._streams)
        self._folder.cleanup()
        return Ended(self._process.exitcode, out, err, left)


def _carry_out(argv: list[str], world: int, setup: Callable[[], object], streams: list[Path]) -> None:
    from tests.faults.jobs import rank, torchrun  # imports torch

    os.setsid()  # to be killed as a whole
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.exit(rank(argv, setup) if world == 1 else torchrun(argv, world, 0, setup))


def run(corpus: Path, runs: Path, *extra: str, world: int = 1, setup: Callable[[], object] = int) -> Ended:
    """Train, without the sample at the end."""
    return Job([*options(corpus, runs), "train.sample_tokens=0", *extra], world, setup).end()
