"""A rank that dies or hangs ends the job within seconds, in one line; several machines train as one does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, options, run
from train import checkpoint

LONG = ["train.steps=500", "train.save_every=2", "train.eval_every=500", "parallel.timeout_seconds=4"]


def torchrun(
    corpus: Path, runs: Path, *extra: str, module: str = "train", launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Two ranks under one torchrun, unless the `launcher`'s arguments say otherwise."""
    program = [
        "-m",
        "torch.distributed.run",
        *(launcher or ("--standalone", "--nproc-per-node=2")),
        "-m",
        module,
    ]
    return subprocess.Popen(
        [sys.executable, *program, *options(corpus, runs), "train.sample_tokens=0", *extra],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes(runs: Path) -> Iterator[Path]:
    """Those in /proc that write to the folder `runs`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.dir={runs}".encode() in (folder / "cmdline").read_bytes():
                yield folder
        except OSError:
            continue


def rank(number: int, runs: Path) -> int:
    """The process of a rank of the job that writes to `runs`."""
    mine = f"RANK={number}".encode()
    return next(int(p.name) for p in processes(runs) if mine in (p / "environ").read_bytes().split(b"\0"))


def children(pid: int) -> list[Path]:
    """All processes below this one."""
    found = (Path(f"/proc/{pid}/task/{pid}/children").read_text()).split()
    return [path for child in found for path in (Path(f"/proc/{child}"), *children(int(child)))]


def wait_for_steps(job: subprocess.Popen[str], folder: Path, steps: int) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count('"lr"') < steps:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def ends(job: subprocess.Popen[str], runs: Path, line: str, seconds: float) -> str:
    """What the job wrote, which must end soon, as a failure, with one such line and no process left."""
    below, began = children(job.pid), time.monotonic()
    errors = job.communicate(timeout=120)[1]
    assert job.returncode != 0 and time.monotonic() - began < seconds
    said = [text for text in errors.splitlines() if text.startswith("error: ")]
    assert len(said) == 1 and line in said[0], errors
    assert "Connection closed" not in errors and "frame #" not in errors, errors
    assert not list(processes(runs)) and not [path for path in below if path.exists()]
    return errors


def test_a_killed_rank_is_named_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    job = torchrun(corpus, tmp_path, *LONG, "run.name=killed")
    wait_for_steps(job, tmp_path / "killed", 6)
    os.kill(rank(1, tmp_path), signal.SIGKILL)
    ends(job, tmp_path, "rank 1 was killed by signal 9", seconds=20)
    folder = tmp_path / "killed" / "checkpoints"
    more = checkpoint.step_of(checkpoint.all_steps(folder)[-1]) + 1
    result = run(corpus, tmp_path, "run.name=killed", "resume=auto", f"train.steps={more}", world=2)
    assert result.returncode == 0 and f"step-{more - 1:08d}" in result.stdout, result.stderr[-3000:]


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job(corpus: Path, tmp_path: Path) -> None:
    job = torchrun(corpus, tmp_path, *LONG, "run.name=stopped")
    wait_for_steps(job, tmp_path / "stopped", 4)
    os.kill(rank(1, tmp_path), signal.SIGSTOP)
    ends(job, tmp_path, "rank 1 is not answering, others in train/", seconds=30)


def test_a_bug_on_one_rank_is_one_traceback(corpus: Path, tmp_path: Path) -> None:
    job = torchrun(corpus, tmp_path, *LONG, "run.name=bug", module="tests.e2e.faulty")
    wait_for_steps(job, tmp_path / "bug", 1)
    errors = ends(job, tmp_path, "rank 1: ValueError: a bug", seconds=60)
    assert errors.count("Traceback") == 2  # the bug's, and torchrun's own at the end


@pytest.mark.slow
def test_two_machines_train_as_one(corpus: Path, tmp_path: Path) -> None:
    """A torchrun for each rank, as on two machines, with experts on both; then a refusal on both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = (
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
    )
    for extra, code in (["parallel.ep=2"], 0), (["optim.lr=-1"], 1):
        nodes = [torchrun(corpus, tmp_path, "run.name=two", *extra, launcher=launcher) for _ in range(2)]
        errors = "".join(node.communicate(timeout=120)[1] for node in nodes)
        assert [node.returncode for node in nodes] == [code, code], errors
        assert [line for line in errors.splitlines() if line.startswith("error: ")][1:] == []
    assert "error: optim.lr" in errors
    alone = run(corpus, tmp_path, "run.name=one", "parallel.ep=2", world=2)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == (
        tmp_path / "one" / "metrics.jsonl"
    ).read_text()
