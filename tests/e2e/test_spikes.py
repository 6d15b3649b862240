"""Spikes in the midst of a run: noticed, undone, passed over or anticipated, and killed meanwhile."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from configs.errors import ConfigError
from data.loader import Batch, Loader, Position
from tests.e2e.runs import Ended, options, run
from tests.e2e.spiking import disturbed, set_up
from train import checkpoint, loop
from train.spikes import Spike, read_spikes

SPIKE = 20
CHANGES = [
    "model.hc_sinkhorn_iters=20",
    "optim.lr=0.02",
    "train.steps=26",
    "train.save_every=5",
    "train.keep_last=9",
    "train.eval_every=100",
    "spikes.window=9",
    "spikes.threshold=30",  # from so few steps deviations are known badly
    "spikes.warmup=9",
    "spikes.cooldown=3",
    "spikes.lookback=2",
    "spikes.ahead=3",
    "spikes.hold=4",
]


def train(corpus: Path, runs: Path, name: str, *extra: str) -> Path:
    """In this process; returns the run's folder."""
    loop.train(
        compose(
            [
                *options(corpus, runs),
                *CHANGES,
                "train.sample_tokens=0",
                "parallel=single",
                f"run.name={name}",
                *extra,
            ]
        )
    )
    return runs / name


def spiking(corpus: Path, runs: Path, name: str, killed: str, *extra: str, world: int = 1) -> Ended:
    """A run of its own whose step SPIKE spikes unless its routing is anticipated."""
    options = [*CHANGES, "spikes.on_spike=anticipate", f"run.name={name}", *extra]
    return run(corpus, runs, *options, world=world, setup=partial(set_up, SPIKE, killed))


def lines(folder: Path, name: str = "metrics") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def same(a: Path, b: Path) -> bool:
    """Whether two runs did the same: metrics byte for byte, checkpoints by name, the last one by its bits."""
    steps = [checkpoint.all_steps(folder / "checkpoints") for folder in (a, b)]
    assert [step.name for step in steps[0]] == [step.name for step in steps[1]]
    with checkpoint.open_tensors(steps[0][-1]) as one, checkpoint.open_tensors(steps[1][-1]) as other:
        equal = one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    return equal and (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(corpus, tmp_path_factory.mktemp("runs"), "undisturbed")


def test_nan_once_leaves_no_trace_but_its_record(
    corpus: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken number that does not come again: by default the run goes back and does the same."""
    monkeypatch.setattr(loop, "train_step", disturbed(loop.train_step, "nan", 13))
    folder = train(corpus, undisturbed.parent, "nan")
    assert same(folder, undisturbed)
    why = "the loss or a gradient norm is not finite"
    assert read_spikes(folder) == [Spike(13, 13, why, "replay", (49, 52), back_to=10)]


def test_nan_again_and_again_ends_the_run(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After as many rollbacks as configured, also counting those before an interruption; never without a
    checkpoint to go back to."""
    whole_step = loop.train_step

    def train_step(*arguments: Any) -> dict[str, float]:
        logged = whole_step(*arguments)
        return logged | {"lm": math.nan} if arguments[3] == 7 else logged

    monkeypatch.setattr(loop, "train_step", train_step)
    ends = r"step 8: .*not finite; "
    with pytest.raises(ConfigError, match=ends + "go on from .*step-00000005, lower"):
        train(corpus, tmp_path, "nan", "spikes.on_nan=stop")
    for tried in (2, 3):
        with pytest.raises(ConfigError, match=ends + f"{tried} rollbacks to step 5 did not help; go on from"):
            train(corpus, tmp_path, "nan", "resume=auto", f"spikes.rollbacks={tried}")
    # What ended a run is dropped when it goes on, and written anew.
    assert [spike.policy for spike in read_spikes(tmp_path / "nan")] == ["replay"] * 3 + ["stop"]
    assert capfd.readouterr().out.count("warning: step 8") == 3
    with pytest.raises(ConfigError, match=ends + "start again"):
        train(corpus, tmp_path, "early", "train.save_every=100")


def test_data_is_passed_over(corpus: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence whose labels are wrong, at whatever step it is trained: afterwards the run is the one
    in which neither it nor those beside it were in the stream."""
    poisoned, prepared = 4 * (SPIKE - 1) + 2, Loader._next

    def poison(loader: Loader) -> tuple[Batch, Position]:
        batch, after = prepared(loader)
        if after.g - 4 < poisoned <= after.g:
            batch = {**batch, "labels": batch["labels"].roll(7, 1)}
        return batch, after

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "_next", poison)
        folder = train(corpus, undisturbed.parent, "skip", "spikes.on_spike=skip")
    (spike,) = read_spikes(folder)
    assert (spike.step, spike.onset, spike.policy, spike.back_to) == (SPIKE, SPIKE, "skip", 15)
    assert spike.sequences == (4 * SPIKE - 3, 4 * SPIKE) and "the loss is " in spike.why
    handed_out = {line["step"]: line["sequences"] for line in lines(folder) if "lm" in line}
    assert (handed_out[SPIKE - 1], handed_out[SPIKE]) == (4 * SPIKE - 4, 4 * SPIKE + 4)
    with monkeypatch.context() as patch:
        patch.setattr(
            Loader, "passed_over", property(lambda _: (range(76, 80),), lambda *_: None), raising=False
        )
        clean = train(corpus, undisturbed.parent, "clean")
    assert same(folder, clean)
    assert lines(folder)[:15] == lines(undisturbed)[:15]

    # Going on after the last checkpoint before the spike was reached again: the file alone says what to skip.
    for step in checkpoint.all_steps(folder / "checkpoints"):
        if checkpoint.step_of(step) > 15:
            shutil.rmtree(step)
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "_next", poison)
        train(corpus, undisturbed.parent, "skip", "resume=auto")
    assert same(folder, clean)


@pytest.fixture(scope="module")
def anticipated(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    result = spiking(corpus, runs, "whole", "", "parallel=single")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "warning: step 20: the" in result.stdout and "anticipate from step 15" in result.stdout
    return runs / "whole"


def test_a_spike_passes_while_routing_is_anticipated(anticipated: Path) -> None:
    (spike,) = read_spikes(anticipated)
    assert (spike.step, spike.onset, spike.policy, spike.back_to) == (SPIKE, SPIKE, "anticipate", 15)
    assert (spike.ahead, spike.until) == (3, 24)
    metrics = {line["step"]: line for line in lines(anticipated) if "lm" in line}
    assert list(metrics) == list(range(1, 27))
    assert metrics[SPIKE]["lm"] < metrics[SPIKE - 4]["lm"] + 0.1
    # Routing of steps 17 to 24 is chosen in steps 16 to 21; the checkpoint of step 20 waits for its use.
    timing = {line["step"]: line for line in lines(anticipated, "timing") if "seconds/step" in line}
    assert [step for step, line in timing.items() if "seconds/anticipate" in line] == [16, 17, 18, 19, 20, 21]
    saved = [checkpoint.step_of(step) for step in checkpoint.all_steps(anticipated / "checkpoints")]
    assert saved == [5, 10, 15, 24, 25, 26]


def test_killed_in_a_rollback_and_while_routing_is_anticipated(
    anticipated: Path, corpus: Path, tmp_path: Path
) -> None:
    """First when the spike is on record and nothing is undone yet, then in the recovery."""
    for killed in ("record", "22", ""):
        result = spiking(corpus, tmp_path, "killed", killed, "parallel=single", "resume=auto")
        assert result.returncode == (-9 if killed else 0), result.stderr[-3000:]
    assert same(tmp_path / "killed", anticipated)
    assert read_spikes(tmp_path / "killed") == read_spikes(anticipated)


def test_two_ranks_do_the_same(anticipated: Path, corpus: Path, tmp_path: Path) -> None:
    result = spiking(corpus, tmp_path, "two", "", "parallel=ep2", world=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (alone,), (spike,) = read_spikes(anticipated), read_spikes(tmp_path / "two")
    assert (spike.step, spike.onset, spike.sequences) == (alone.step, alone.onset, alone.sequences)
    assert result.stdout.count("warning: step 20") == 1
    losses = [
        [line["lm"] for line in lines(folder) if "lm" in line] for folder in (tmp_path / "two", anticipated)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
