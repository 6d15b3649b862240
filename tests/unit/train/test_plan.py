"""`python -m train.plan` prints memory and traffic of a mesh, or one line for what cannot be."""

from __future__ import annotations

import pytest

from train import cli
from train.plan import HELP, main


def test_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ranks=2", "parallel=ep2", "gpu_gib=10"], HELP, main) == 0
    text = capsys.readouterr().out
    assert "at the peak" in text and "10.00" in text
    assert "expert rows" in text and "gradients, dense" in text and "kB a token" in text


def test_older_gpus_run_no_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = []
    for more in ([], ["gpu=older"], ["train.device=cpu"]):
        assert cli.run(["ranks=1", "precision=bf16", "train.seq_len=512", *more], HELP, main) == 0
        peaks.append(next(x for x in capsys.readouterr().out.splitlines() if "activations" in x))
    assert peaks[0] != peaks[1] == peaks[2]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ranks=0"], "ranks is 0; it must be 1 or more"),
        (["ranks=1", "gpu=ampere"], "gpu is 'ampere'; it must be hopper or older"),
        (["ranks=3", "parallel=ep2"], "parallel.ep is 2; it must be a divisor of the number of ranks, 3"),
        ([], "ranks"),
        (["ranks=2", "train.stepz=3"], "train.stepz"),
    ],
)
def test_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments, HELP, main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1
