"""Where a run goes on: the newest good checkpoint, and never a beginning that would remove what is there."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from configs.compose import compose
from configs.errors import ConfigError
from train import checkpoint, saving
from train.metrics import JsonLines, keep_until
from train.resume import (
    drop_after,
    find_checkpoint,
    new_folder,
    remember,
    restarted,
    run_of,
    unless_rolled_back,
)
from train.spikes import Spike, read_spikes, write_spikes


def config(runs: Path, resume: Path | str | None, name: str | None = None) -> Any:
    run = SimpleNamespace(dir=str(runs), name=name)
    return SimpleNamespace(run=run, resume=None if resume is None else str(resume))


def save(runs: Path, name: str, step: int, age: int = 0) -> Path:
    """A checkpoint that was written `age` seconds ago."""
    tensors = {"weight.a": torch.full((4,), float(step))}
    specs = {"weight.a": (torch.float32, (4,))}
    folder = saving.write(runs / name / "checkpoints", step, specs, tensors.items(), {})
    then = folder.stat().st_mtime - age
    os.utime(folder, (then, then))
    return folder


def break_(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.all_steps(folder)]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Run a has steps 5 and 10, run b, saved later, steps 2 and 4."""
    for name, step, age in (("a", 5, 400), ("a", 10, 300), ("b", 2, 200), ("b", 4, 100)):
        save(tmp_path, name, step, age)
    (tmp_path / "notes.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("resume", "name", "found"),
    [
        (None, "a", None),
        ("auto", "a", "a/checkpoints/step-00000010"),
        ("auto", "b", "b/checkpoints/step-00000004"),
        ("auto", None, "b/checkpoints/step-00000004"),
        ("auto", "new", None),
        ("a", None, "a/checkpoints/step-00000010"),
        ("a", "a", "a/checkpoints/step-00000010"),
        ("a/checkpoints/step-00000005", None, "a/checkpoints/step-00000005"),
    ],
)
def test_the_named_or_newest_checkpoint_is_found(
    runs: Path, resume: str | None, name: str | None, found: str | None
) -> None:
    place = resume if resume in (None, "auto") else runs / resume
    assert find_checkpoint(config(runs, place, name), pytest.fail) == (found and runs / found)


def test_nothing_there_yet(tmp_path: Path) -> None:
    assert find_checkpoint(config(tmp_path / "runs", "auto"), pytest.fail) is None
    assert find_checkpoint(config(tmp_path / "runs", "auto", "a"), pytest.fail) is None


@pytest.mark.parametrize(("resume", "name"), [("auto", "a"), ("a", None)])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(runs: Path, resume: str, name: str | None) -> None:
    good = runs / "a" / "checkpoints" / "step-00000005"
    break_(save(runs, "a", 15))
    break_(runs / "a" / "checkpoints" / "step-00000010")
    (save(runs, "a", 20) / "manifest.json").unlink()
    warnings: list[str] = []
    place = "auto" if resume == "auto" else runs / resume
    assert find_checkpoint(config(runs, place, name), warnings.append) == good
    assert [words.split()[0] for words in warnings] == ["step-00000020", "step-00000015", "step-00000010"]
    assert not any("\n" in words for words in warnings)


def test_auto_leaves_a_run_that_is_all_damaged_but_begins_none_in_its_place(runs: Path) -> None:
    for step in (2, 4):
        break_(runs / "b" / "checkpoints" / f"step-{step:08d}")
    warnings: list[str] = []
    found = find_checkpoint(config(runs, "auto"), warnings.append)
    assert found == runs / "a" / "checkpoints" / "step-00000010" and len(warnings) == 2
    (save(runs, "c", 1) / "manifest.json").unlink()
    for name in ("b", "c"):
        with pytest.raises(ConfigError, match=r"all checkpoints in .* are damaged"):
            find_checkpoint(config(runs, "auto", name), warnings.append)


def test_a_named_checkpoint_that_is_damaged_is_an_error(runs: Path) -> None:
    folder = runs / "a" / "checkpoints" / "step-00000010"
    break_(folder)
    with pytest.raises(ConfigError, match="does not match its checksum") as error:
        find_checkpoint(config(runs, folder), pytest.fail)
    assert "\n" not in str(error.value)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"manifest\.json is missing"):
        find_checkpoint(config(runs, folder), pytest.fail)


@pytest.mark.parametrize(
    ("resume", "name", "words"),
    [
        ("a", "b", "run.name is 'b', but resume goes on with 'a'"),
        ("a/checkpoints/step-00000005", "b", "run.name is 'b', but resume goes on with 'a'"),
        ("empty", None, "holds no good checkpoint; name a run's folder or a checkpoint in it"),
    ],
)
def test_a_wrong_place_is_one_line(runs: Path, resume: str, name: str | None, words: str) -> None:
    (runs / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        find_checkpoint(config(runs, runs / resume, name), pytest.fail)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_check_of_several_ranks_takes_the_place_of_verify(runs: Path) -> None:
    seen: list[Path] = []
    found = find_checkpoint(config(runs, "auto", "a"), pytest.fail, seen.append)
    assert seen == [found] and found is not None and run_of(found) == runs / "a"


def test_an_abandoned_branch_is_dropped(runs: Path) -> None:
    folder = runs / "a" / "checkpoints"
    (folder / "step-00000020").mkdir()  # what is left of a damaged one
    drop_after(runs / "a", 5)
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    assert steps(runs / "b" / "checkpoints") == ["step-00000002", "step-00000004"]


def test_a_rollback_that_was_interrupted_is_finished(runs: Path) -> None:
    """What was saved in a spike is there still: a run goes on from where it had gone back to. What it saved
    after that is good, however many rollbacks there were before."""

    def saved(step: int, rollbacks: int) -> Path:
        specs = {"weight.a": (torch.float32, (1,))}
        tensors = {"weight.a": torch.zeros(1)}
        manifest = {"rollbacks": rollbacks}
        return saving.write(runs / "a" / "checkpoints", step, specs, tensors.items(), manifest)

    back = Spike(22, 19, "high", "skip", (1, 4), back_to=18)
    noted = Spike(23, 23, "high", "record", (5, 8))
    before, stale = saved(18, 0), saved(20, 0)
    assert unless_rolled_back(stale, pytest.fail) == stale
    write_spikes(runs / "a", [back, noted])
    assert unless_rolled_back(stale, pytest.fail) == before
    assert unless_rolled_back(before, pytest.fail) == before
    later = saved(21, 1)
    assert unless_rolled_back(later, pytest.fail) == later
    write_spikes(runs / "a", [back, noted, Spike(24, 17, "high", "replay", (1, 8), back_to=10)])
    assert unless_rolled_back(later, pytest.fail).name == "step-00000010"
    break_(later.with_name("step-00000010"))
    warnings: list[str] = []
    assert unless_rolled_back(later, warnings.append).name == "step-00000005"
    break_(later.with_name("step-00000005"))
    with pytest.raises(ConfigError, match="is from a spike, all before it are damaged"):
        unless_rolled_back(later, warnings.append)
    drop_after(runs / "a", 10)
    assert len(read_spikes(runs / "a")) == 3


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


@pytest.mark.parametrize("given", [[], ["run.name=mine"], ["resume=auto"]])
def test_a_job_that_torchrun_restarts_goes_on_with_the_run_that_it_began(
    tmp_path: Path, given: list[str]
) -> None:
    config, store = compose([*given, f"run.dir={tmp_path}"]), HashStore()
    assert restarted(config, store) == restarted(config, None) == config
    folder = new_folder(config)
    folder.mkdir()
    (folder / "config.yaml").touch()
    remember(folder, store)
    save(tmp_path, "another, and newer", 9)
    again = restarted(config, store)
    assert find_checkpoint(again, print) is None and new_folder(again) == folder
    newest = save(tmp_path, folder.name, 3, age=100)
    assert find_checkpoint(again, print) == newest


def test_a_job_that_went_on_from_an_old_checkpoint_goes_on_from_its_newest(runs: Path) -> None:
    old, store = runs / "a" / "checkpoints" / "step-00000005", HashStore()
    remember(run_of(old), store)
    again = restarted(compose([f"resume={old}"]), store)
    assert find_checkpoint(again, print) == runs / "a" / "checkpoints" / "step-00000010"
