"""Checkpoints: whole or absent, and one clear line for what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from train import checkpoint
from train.metrics import JsonLines, keep_until
from train.resume import drop_after


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight.a": torch.full((3, 4), value), "step.a": torch.tensor(value)}


def meta(step: int) -> dict[str, object]:
    return {"step": step, "data": {}, "config": ""}


def test_round_trip_and_keep(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, tensors(step), meta(step), keep=2)
    assert [path.name for path in checkpoint.all_steps(tmp_path)] == ["step-00000010", "step-00000015"]
    read, read_meta = checkpoint.load(checkpoint.all_steps(tmp_path)[-1])
    assert read_meta == meta(15)
    assert torch.equal(read["weight.a"], tensors(15)["weight.a"])


def test_a_save_that_dies_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 5, tensors(5), meta(5))

    def die(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "flush", die)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 10, tensors(10), meta(10))
    assert [path.name for path in checkpoint.all_steps(tmp_path)] == ["step-00000005"]


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.META])
def test_a_torn_file_is_one_line(tmp_path: Path, file: str) -> None:
    folder = checkpoint.save(tmp_path, 5, tensors(5), meta(5))
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="not a whole checkpoint") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


def test_an_abandoned_branch_is_dropped_and_half_deleted_ones_do_not_count(tmp_path: Path) -> None:
    steps = tmp_path / "checkpoints"
    for step in (5, 10):
        checkpoint.save(steps, step, tensors(step), meta(step))
    (steps / "step-00000002").mkdir()
    drop_after(tmp_path, 5)
    assert [path.name for path in checkpoint.all_steps(steps)] == ["step-00000005"]
    checkpoint.save(steps, 5, tensors(6), meta(5))  # the same step once more replaces it
    read, _ = checkpoint.load(checkpoint.all_steps(steps)[-1])
    assert torch.equal(read["weight.a"], tensors(6)["weight.a"])


def test_metrics_are_cut_back_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in range(1, 6):
        log.write(step=step, lm=float(step))
    with path.open("a") as file:
        file.write('{"step": 6, "lm"')  # killed while writing
    keep_until(path, 3)
    assert [line.partition(",")[0] for line in path.read_text().splitlines()] == [
        f'{{"step": {n}' for n in (1, 2, 3)
    ]
