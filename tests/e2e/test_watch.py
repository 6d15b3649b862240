"""A rank that dies or hangs ends the job within seconds, in one line; several machines train as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.failing import set_up
from tests.e2e.runs import ROOT, Job, options

CHANGES = [
    "train.steps=16",
    "train.save_every=1",
    "train.eval_every=100",
    "train.sample_tokens=0",
    "parallel.ep=2",
    "resume=auto",
]
FAILURES = {
    "SIGKILL": "rank 1 is gone: killed",
    "SIGSTOP": "rank 1 is not answering: no progress for 4 s",
    "raise": "rank 1: ValueError: a bug",
    "loop": "rank 1 is in train/loop.py:",
}


def two_agents(corpus: Path, runs: Path, *extra: str) -> list[subprocess.Popen[str]]:
    """What two machines start, on this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"]
    program = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meet, "-m", "train"]
    return [
        subprocess.Popen(
            [sys.executable, *program, *options(corpus, runs), *CHANGES, *extra],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"lr"') if path.exists() else 0


def fail(what: str, argv: list[str], folder: Path, seconds: float = 40) -> None:
    """Go on with the run until rank 1 fails in its third step; all must end soon, and one line say why."""
    before = steps_done(folder)
    job = Job([*argv, "parallel.timeout_seconds=4"], world=2, setup=partial(set_up, what))
    deadline = time.monotonic() + 200
    while steps_done(folder) < before + 2 and job.runs:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    failed = job.end(seconds)
    said = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 1 and not failed.left, failed
    assert len(said) == 1 and said[0].startswith(f"error: {FAILURES[what]}"), failed.stderr
    assert "frame #" not in failed.stderr


def test_whatever_happens_to_a_rank_the_job_ends_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    argv = [*options(corpus, tmp_path), *CHANGES, "run.name=failing"]
    for what in FAILURES:
        fail(what, argv, tmp_path / "failing")
    last = Job(argv, world=2).end()
    assert last.returncode == 0, last.stderr
    nodes = two_agents(corpus, tmp_path, "run.name=nodes")
    errors = "".join(node.communicate(timeout=300)[1] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], errors
    expected, found = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("failing", "nodes"))
    for one, other in zip(expected.splitlines(), found.splitlines(), strict=True):
        assert json.loads(other) == pytest.approx(json.loads(one), rel=1e-6, abs=1e-6)
