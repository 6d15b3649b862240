"""What a run says of its validation: by source, by position, accuracies and the retrieval probe; and that
asking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import run
from train import checkpoint


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`corpus` and a source of words, in place of one."""
    folder = tmp_path_factory.mktemp("words")
    rows = [{"text": " ".join(f"word{i * k % 37}" for k in range(1, i % 60 + 2))} for i in range(200)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "data.path=null",
        "~data.sources.python",
        f"data.sources.numbers.files=[{corpus}]",
        f"data.sources.words.files=[{folder}/*.jsonl]",
        f"data.cache_dir={folder / 'cache'}",
        "train.seq_len=96",
        "train.batch_tokens=384",
        "train.eval_tokens=2048",
    ]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without(rows: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [{name: x for name, x in row.items() if not name.startswith(prefix)} for row in rows]


def test_asking_changes_nothing(corpus: Path, sources: list[str], tmp_path: Path) -> None:
    """A run with the probe, one without, one that asks from its middle on: the same weights and metrics."""
    asking = run(corpus, tmp_path, *sources, "run.name=asking", "train.needle=2")
    assert asking.returncode == 0, asking.stderr[-3000:]
    assert "accuracy" in asking.stdout and "needle" in asking.stdout
    rows = lines(tmp_path / "asking")
    for row in (row for row in rows if "valid_lm" in row):
        parts = [row[f"valid_lm/{name}"] for name in ("numbers", "words")]
        assert min(parts) < row["valid_lm"] < max(parts)
        assert 0 <= row["valid_accuracy"] <= 1 and 0 <= row["valid_mtp_accuracy"] <= 1
        assert {"valid_lm/at_0", "valid_lm/at_64"} < row.keys() and "valid_lm/at_128" not in row
        assert row["needle_control"] > 0 and row["needle_loss/50"] > 0 and 0 <= row["needle_accuracy"] <= 1

    silent = run(corpus, tmp_path, *sources, "run.name=silent")
    assert silent.returncode == 0, silent.stderr[-3000:]
    assert lines(tmp_path / "silent") == without(rows, "needle")
    assert equal_ends(tmp_path / "asking", tmp_path / "silent")

    half = tmp_path / "silent" / "checkpoints" / "step-00000003"
    resumed = run(corpus, tmp_path, *sources, f"resume={half}", "train.needle=2")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert lines(tmp_path / "silent")[-4:] == rows[-4:]
    assert equal_ends(tmp_path / "asking", tmp_path / "silent")


def equal_ends(a: Path, b: Path) -> bool:
    """Whether two runs end with the same state, data position and generators included, to the bit."""
    ends = [checkpoint.all_steps(folder / "checkpoints")[-1] for folder in (a, b)]
    one, other = (checkpoint.read_manifest(end)["data"] for end in ends)
    with checkpoint.open_tensors(ends[0]) as first, checkpoint.open_tensors(ends[1]) as second:
        assert first.keys() == second.keys() and "rng.cpu.0" in first
        return one == other and all(first[key].equal(second[key]) for key in first)


def test_two_ranks_say_the_same(corpus: Path, sources: list[str], tmp_path: Path) -> None:
    short = [*sources, "train.steps=1", "optim.warmup_steps=0", "train.needle=1"]
    for world in (1, 2):
        done = run(corpus, tmp_path, *short, f"run.name=of{world}", f"parallel.ep={world}", world=world)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (lines(tmp_path / f"of{world}")[0] for world in (1, 2))
    chosen = {name for name in one if name.startswith(("valid_", "needle"))}
    assert len(chosen) == 2 + 2 + 2 + 2 + 7
    assert {name: two[name] for name in chosen} == pytest.approx(
        {name: one[name] for name in chosen}, rel=1e-5
    )
