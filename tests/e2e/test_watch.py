"""A rank that dies or hangs ends the job within seconds, in one line; several machines train as one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, options

CHANGES = [
    "train.steps=16",
    "train.save_every=1",
    "train.eval_every=100",
    "train.sample_tokens=0",
    "parallel.ep=2",
    "resume=auto",
]
ONE_AGENT = ["--standalone", "--nproc-per-node=2"]
FAILURES = {
    "kill": "rank 1 is gone: killed",
    "stop": "rank 1 is not answering: no progress for 4 s",
    "raise": "rank 1: ValueError: a bug",
    "loop": "rank 1 is in train/loop.py:",
}


def agent(
    launcher: list[str], module: list[str], corpus: Path, runs: Path, *extra: str
) -> subprocess.Popen[str]:
    """One torchrun."""
    program = ["-m", "torch.distributed.run", *launcher, "-m", *module]
    return subprocess.Popen(
        [sys.executable, *program, *options(corpus, runs), *CHANGES, *extra],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def two_agents(corpus: Path, runs: Path, *extra: str) -> list[subprocess.Popen[str]]:
    """What two machines start, on this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"]
    launcher = ["--nnodes=2", "--nproc-per-node=1", *meet]
    return [agent(launcher, ["train"], corpus, runs, *extra) for _ in range(2)]


def processes(runs: Path) -> Iterator[Path]:
    """Those in /proc whose arguments name the folder `runs`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.dir={runs}".encode() in (folder / "cmdline").read_bytes():
                yield folder
        except OSError:
            continue


def pid_of(rank: int, runs: Path) -> int:
    mine = f"RANK={rank}".encode()
    return next(int(p.name) for p in processes(runs) if mine in (p / "environ").read_bytes().split(b"\0"))


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"lr"') if path.exists() else 0


def fail(what: str, corpus: Path, runs: Path, seconds: float = 40) -> None:
    """Go on with the run until rank 1 fails in its third step; all must end soon, and one line say why."""
    signals, folder = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}, runs / "failing"
    before, extra = steps_done(folder), ["run.name=failing", "parallel.timeout_seconds=4"]
    module = ["train"] if what in signals else ["tests.e2e.failing", what]
    job = agent(ONE_AGENT, module, corpus, runs, *extra)
    deadline = time.monotonic() + 200
    while steps_done(folder) < before + 2 and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if what in signals:
        os.kill(pid_of(1, runs), signals[what])
    began = time.monotonic()
    errors = job.communicate(timeout=120)[1]
    took = time.monotonic() - began
    assert job.returncode != 0 and took < seconds, (took, errors)
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(f"error: {FAILURES[what]}"), errors
    assert "frame #" not in errors and not list(processes(runs))


def test_whatever_happens_to_a_rank_the_job_ends_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    for what in FAILURES:
        fail(what, corpus, tmp_path)
    last = agent(ONE_AGENT, ["train"], corpus, tmp_path, "run.name=failing")
    errors = last.communicate(timeout=300)[1]
    assert last.returncode == 0, errors
    nodes = two_agents(corpus, tmp_path, "run.name=nodes")
    errors = "".join(node.communicate(timeout=300)[1] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], errors
    expected, found = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("failing", "nodes"))
    for one, other in zip(expected.splitlines(), found.splitlines(), strict=True):
        assert json.loads(other) == pytest.approx(json.loads(one), rel=1e-6, abs=1e-6)
