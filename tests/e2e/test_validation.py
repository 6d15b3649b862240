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


@pytest.fixture(scope="module")
def asking(corpus: Path, sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two sources with the probe."""
    runs = tmp_path_factory.mktemp("asking")
    done = run(corpus, runs, *sources, "run.name=asking", "train.needle=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy" in done.stdout and "needle" in done.stdout
    return runs / "asking"


def test_what_is_measured(asking: Path) -> None:
    for row in (row for row in lines(asking) if "valid_lm" in row):
        parts = [row[f"valid_lm/{name}"] for name in ("numbers", "words")]
        assert min(parts) < row["valid_lm"] < max(parts)
        assert 0 <= row["valid_accuracy"] <= 1 and 0 <= row["valid_mtp_accuracy"] <= 1
        assert {"valid_lm/at_0", "valid_lm/at_64"} < row.keys() and "valid_lm/at_128" not in row
        assert row["needle_control"] > 0 and row["needle_loss/50"] > 0 and 0 <= row["needle_accuracy"] <= 1


def test_asking_changes_nothing(corpus: Path, sources: list[str], asking: Path, tmp_path: Path) -> None:
    """Without the probe, and asked only from the middle on after a resume: the same weights and metrics."""
    silent, rows = tmp_path / "silent", lines(asking)
    done = run(corpus, tmp_path, *sources, "run.name=silent")
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(silent) == without(rows, "needle")
    assert equal_ends(asking, silent)
    half = silent / "checkpoints" / "step-00000003"
    resumed = run(corpus, tmp_path, *sources, f"resume={half}", "train.needle=2")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert lines(silent)[-4:] == rows[-4:] and "needle_control" in rows[-1]
    assert equal_ends(asking, silent)


def test_two_ranks_say_the_same(corpus: Path, sources: list[str], asking: Path, tmp_path: Path) -> None:
    short = ["train.steps=1", "optim.warmup_steps=0", "train.needle=2", "parallel.ep=2", "run.name=two"]
    done = run(corpus, tmp_path, *sources, *short, world=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = lines(asking)[0], lines(tmp_path / "two")[0]
    chosen = {name for name in one if name.startswith(("valid_", "needle"))}
    assert len(chosen) == 3 + 2 + 2 + 2 + 7
    assert {name: two[name] for name in chosen} == pytest.approx(
        {name: one[name] for name in chosen}, rel=1e-5
    )


def equal_ends(a: Path, b: Path) -> bool:
    """Whether two runs end with the same state, data position and generators included, to the bit."""
    ends = [checkpoint.all_steps(folder / "checkpoints")[-1] for folder in (a, b)]
    one, other = (checkpoint.read_manifest(end)["data"] for end in ends)
    with checkpoint.open_tensors(ends[0]) as first, checkpoint.open_tensors(ends[1]) as second:
        assert first.keys() == second.keys() and "rng.cpu.0" in first
        return one == other and all(first[key].equal(second[key]) for key in first)
