"""kill -9 at random moments, also while checkpoints are written: the run ends as if nothing had happened.

FOURFOLD_KILLS=20 python -m pytest tests/e2e/test_kill.py     kills that often, with 1 and with 2 ranks
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.e2e.runs import Job, options
from train import checkpoint

KILLS = int(os.environ.get("FOURFOLD_KILLS", "2"))
STEPS = max(6, 2 * KILLS)


def start(world: int, corpus: Path, runs: Path, name: str) -> Job:
    changes = [f"train.steps={STEPS}", "train.save_every=1", "train.eval_every=100", "train.keep_last=2"]
    return Job([*options(corpus, runs), *changes, f"run.name={name}", "resume=auto"], world)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"lr"') if path.exists() else 0


def kill_somewhere(job: Job, folder: Path, dice: random.Random) -> None:
    """Kill a step or two later, at a random moment between two steps."""
    goal = steps_done(folder) + dice.randint(1, 2)
    deadline = time.monotonic() + 240
    while steps_done(folder) < goal and job.runs:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(dice.random() * 0.3)
    job.kill()
    job.end()


@pytest.mark.parametrize("world", [1, 2])
def test_killed_runs_end_bitwise_equal(world: int, corpus: Path, tmp_path: Path) -> None:
    whole = start(world, corpus, tmp_path, "whole").end()
    assert whole.returncode == 0, whole.stderr
    folder, dice = tmp_path / "killed", random.Random(world)
    for _ in range(KILLS):
        kill_somewhere(start(world, corpus, tmp_path, "killed"), folder, dice)
    last = start(world, corpus, tmp_path, "killed").end()
    assert last.returncode == 0, last.stderr
    assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    ends = [checkpoint.all_steps(tmp_path / name / "checkpoints")[-1] for name in ("whole", "killed")]
    assert ends[0].name == ends[1].name == f"step-{STEPS:08d}"
    with checkpoint.open_tensors(ends[0]) as expected, checkpoint.open_tensors(ends[1]) as found:
        assert expected.keys() == found.keys() and len(found) > 100
        assert all(expected[key].equal(found[key]) for key in expected)
    assert [path.name for path in (folder / "checkpoints").iterdir() if "partial" in path.name] == []
