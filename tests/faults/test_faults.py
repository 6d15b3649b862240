"""Eight runs with faults of every kind end as if nothing had happened; a bug is found and can be repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.plan import KINDS, STEPS, plan

ROOT = Path(__file__).parents[2]


def harness(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_eight_runs_end_as_if_nothing_had_happened() -> None:
    result = harness("--runs", "8", "--jobs", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("8 passed, 0 failed\n")


@pytest.mark.slow
def test_biases_that_are_not_restored_are_found() -> None:
    result = harness("--only", "4", "--broken")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "e_score_correction_bias differs from the uninterrupted run's" in result.stdout
    assert "again: python -m tests.faults --seed 0 --only 4\n" in result.stdout
    assert result.stdout.endswith("0 passed, 1 failed\n")


def test_a_seed_says_what_happens_and_few_runs_have_every_kind() -> None:
    plans = [plan(seed=0, number=number) for number in range(8)]
    assert plans == [plan(seed=0, number=number) for number in range(8)]
    assert plans != [plan(seed=1, number=number) for number in range(8)]
    assert {fault.kind for each in plans for fault in each.faults} == set(KINDS)
    assert {each.ranks for each in plans} == {1, 2}
    for each in (plan(seed, number) for seed in range(3) for number in range(200)):
        steps = [fault.step for fault in each.faults]
        assert steps[0] > 1 and steps == sorted(set(steps)) and steps[-1] < STEPS
        assert all(fault.rank < each.ranks for fault in each.faults)
