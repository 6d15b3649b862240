"""`python -m train` as a person runs it: repeatable, resumable, on one's own text, with clear refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, Ended, Job, options


def command(corpus: Path, cwd: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "train", *options(corpus, cwd / "runs"), *extra]


def program(corpus: Path, cwd: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a shell starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        command(corpus, cwd, *extra), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def run(corpus: Path, cwd: Path, *extra: str) -> Ended:
    """In a fork."""
    return Job([*options(corpus, cwd / "runs"), *extra]).end()


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_repeats_resumes_and_exports(corpus: Path, tmp_path: Path) -> None:
    first = program(corpus, tmp_path, "run.name=first")
    assert first.returncode == 0, first.stderr
    assert "validation loss" in first.stdout and "sample" in first.stdout
    again = run(corpus, tmp_path, "run.name=again")
    runs = tmp_path / "runs"
    whole = (runs / "first" / "metrics.jsonl").read_text()
    assert (runs / "again" / "metrics.jsonl").read_text() == whole, again.stderr
    assert len([line for line in metrics(runs / "first") if "lm" in line]) == 6

    # Half of it, then the rest from its checkpoint: the same lines.
    from_three = run(corpus, tmp_path, f"resume={runs / 'again' / 'checkpoints' / 'step-00000003'}")
    assert from_three.returncode == 0, from_three.stderr
    assert (runs / "again" / "metrics.jsonl").read_text() == whole
    assert (runs / "first" / "model" / "config.json").exists()
    refused = run(corpus, tmp_path, "run.name=first")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "run.name" in refused.stderr


def test_resume_goes_on_where_and_only_where_it_should(corpus: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert run(corpus, tmp_path, "run.name=a", "resume=auto").returncode == 0  # nothing to resume: a new run
    steps = runs / "a" / "checkpoints"
    torn = steps / "step-00000009"  # half deleted: no checkpoint
    torn.mkdir()
    again = run(
        corpus, tmp_path, "run.name=a", f"resume={steps / 'step-00000003'}", "train.mtp_loss_weight=0.2"
    )
    assert again.returncode == 0 and "changed train.mtp_loss_weight: 0.3 -> 0.2" in again.stdout
    whole = (runs / "a" / "metrics.jsonl").read_text()
    finished = run(corpus, tmp_path, "run.name=a", "resume=auto", "train.mtp_loss_weight=0.2")
    assert finished.returncode == 0 and (runs / "a" / "metrics.jsonl").read_text() == whole
    for extra, words in (
        (["run.name=b", f"resume={steps / 'step-00000003'}"], "run.name"),
        (["resume=auto", "train.steps=4"], "train.steps"),
        (["resume=auto", "optim.name=adamw"], "optim"),
    ):
        refused = run(corpus, tmp_path, *extra)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
    assert (runs / "a" / "metrics.jsonl").read_text() == whole


def test_a_sweep_is_one_run_a_value(corpus: Path, tmp_path: Path) -> None:
    sweep = program(corpus, tmp_path, "-m", "train.seed=0,1", "train.steps=2", "optim.warmup_steps=1")
    assert sweep.returncode == 0, sweep.stderr
    first, second = sorted((tmp_path / "runs").glob("sweep-*/*/metrics.jsonl"))
    assert first.read_text() != second.read_text()


def test_interrupt_saves_and_says_how_to_go_on(corpus: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    started = subprocess.Popen(
        command(corpus, tmp_path, "run.name=stopped", "train.steps=2000", "train.save_every=2000"),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith("step      2"):
            break
    started.send_signal(signal.SIGINT)
    rest = started.stdout.read()
    assert started.wait() == 130
    assert "go on with the same arguments and resume=" in rest
    assert list((tmp_path / "runs" / "stopped" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["train.stepz=3"], "train.stepz"),
        (["data.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["resume=/nowhere"], "resume"),
        (["run.dir=/dev/null/runs"], "run.dir"),
        (["model.moe_intermediate_size=99999992"], "GiB"),
        (["train.device=cuda"], "train.device"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    corpus: Path, tmp_path: Path, extra: list[str], words: str
) -> None:
    if extra == ["train.device=cuda"]:
        import torch

        if torch.cuda.is_available():
            return
    failed = (program if words == "/nowhere/at/all" else run)(corpus, tmp_path, *extra)
    assert failed.returncode == 2
    assert words in failed.stderr and failed.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
