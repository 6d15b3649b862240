"""A rank that dies or hangs ends the job within seconds: one line names it, nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, options, run

ENDS = 10.0  # seconds that a job may take to end once a rank has died
TIMEOUT = 3  # of the hanging ones
QUIET = ["train.sample_tokens=0", "train.save_every=1", f"parallel.timeout_seconds={TIMEOUT}"]


def start(
    corpus: Path, runs: Path, name: str, *extra: str, program: tuple[str, ...] = ("train",)
) -> subprocess.Popen[str]:
    """A run of two ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *program]
    return subprocess.Popen(
        [sys.executable, *launcher, *options(corpus, runs), *QUIET, f"run.name={name}", *extra],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes(argument: str) -> dict[int, list[str]]:
    """All processes that have this argument, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if argument in words:
            found[int(folder.name)] = words
    return found


def rank_of(pid: int) -> str | None:
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(word.partition("=")[::2] for word in words).get("RANK")


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def send_to_rank_1(job: subprocess.Popen[str], runs: Path, name: str, number: signal.Signals) -> None:
    """Once the run has done a few steps."""
    until(lambda: job.poll() is not None or steps(runs / name) >= 3)
    ranks = {rank_of(pid): pid for pid in processes(f"run.name={name}")}
    os.kill(ranks["1"], number)


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"lr"') if path.exists() else 0


def ended(job: subprocess.Popen[str], name: str, seconds: float) -> tuple[str, str]:
    """The one line that says why, and everything on stderr, of a job that ends in time and completely."""
    began = time.monotonic()
    text = job.communicate(timeout=120)[1]
    assert time.monotonic() - began < seconds, text
    assert job.returncode == 1, text
    until(lambda: not processes(f"run.name={name}"), 1)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line, text.partition("torch.distributed.elastic")[0]  # before torchrun's own report


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    job = start(corpus, tmp_path, "killed", "train.steps=500")
    send_to_rank_1(job, tmp_path, "killed", signal.SIGKILL)
    line, text = ended(job, "killed", ENDS)
    assert line.startswith("error: rank 1 was killed by signal 9 (SIGKILL)") and "resume=auto" in line
    assert "closed by peer" not in text
    done = steps(tmp_path / "killed")
    again = run(corpus, tmp_path, "run.name=killed", "resume=auto", f"train.steps={done + 1}", world=2)
    assert again.returncode == 0 and steps(tmp_path / "killed") == done + 1, again.stderr


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_killed(corpus: Path, tmp_path: Path) -> None:
    job = start(corpus, tmp_path, "stopped", "train.steps=5000")
    send_to_rank_1(job, tmp_path, "stopped", signal.SIGSTOP)
    line, _ = ended(job, "stopped", TIMEOUT + ENDS)
    assert "rank 1 gave no sign of life" in line and "others waited in train/" in line
    assert "parallel.timeout_seconds" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raise", ["rank 1: ValueError: a bug"]),
        ("loop", ["rank 1 stood still in train/loop.py:", "others waited in train/loop.py:"]),
        ("alone", ["rank 0 stood still in train/loop.py:", "rank 1 stood still in train/loop.py:"]),
    ],
)
def test_a_rank_that_fails_is_named(what: str, words: list[str], corpus: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    job = start(corpus, tmp_path, what, program=("tests.e2e.failing", what))
    until(lambda: job.poll() is not None or steps(tmp_path / what) >= 2)
    line, text = ended(job, what, TIMEOUT + ENDS)
    assert all(word in line for word in words), (line, time.monotonic() - began)
    assert text.count("ValueError: a bug") == (2 if what == "raise" else 0)  # with a traceback, once
    assert "closed by peer" not in text


@pytest.mark.slow
def test_without_torchrun_the_ranks_end_by_themselves(corpus: Path, tmp_path: Path) -> None:
    job = start(corpus, tmp_path, "orphans", "train.steps=5000")
    until(lambda: job.poll() is not None or steps(tmp_path / "orphans") >= 2)
    job.kill()
    until(lambda: not processes("run.name=orphans"), ENDS)


def test_two_agents_are_as_good_as_one(corpus: Path, tmp_path: Path) -> None:
    """Two nodes, each with its own torchrun, on one machine: without a name, rank 0's clock names the run."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    nodes = f"--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=localhost:{port}"
    command = [sys.executable, "-m", "torch.distributed.run", *nodes.split(), "-m", "train"]
    command += [*options(corpus, tmp_path / "two"), *QUIET]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    one = run(corpus, tmp_path, *QUIET, "run.name=one", world=2)
    for agent in agents:
        assert agent.communicate(timeout=120) and agent.returncode == 0
    assert one.returncode == 0, one.stderr
    (folder,) = (tmp_path / "two").iterdir()
    assert (folder / "metrics.jsonl").read_text() == (tmp_path / "one" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_other_node(corpus: Path, tmp_path: Path) -> None:
    ...


def test_a_refusal_of_many_ranks_is_one_line(corpus: Path, tmp_path: Path) -> None:
    for extra in ("parallel=single", "train.stepz=1"):
        job = start(corpus, tmp_path, "refused", extra)
        line, _ = ended(job, "refused", 60)
        assert extra.split("=")[0] in line
