"""Runs over several sources, with phases: any number of ranks, any interruption, the same global batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.runs import run

PHASES = [
    "phases.short.steps=3",
    "phases.short.seq_len=32",
    "phases.short.ramp_from=128",
    "phases.long.seq_len=128",
    "phases.long.weights={words: 0.25, numbers: 0.75}",
    "train.steps=8",
    "train.batch_tokens=512",
    "optim.name=adamw",
    "optim.eps=1e-4",  # elements whose gradient is rounding alone would else differ between worlds
]


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources in place of one: `corpus`, and JSON lines of words."""
    folder = tmp_path_factory.mktemp("words")
    rows = [{"content": " ".join(f"word{i * k % 37}" for k in range(1, i % 60 + 2))} for i in range(200)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "data.path=null",
        "~data.sources.python",
        f"data.sources.numbers.files=[{corpus}]",
        f"data.sources.words.files=[{folder}/*.jsonl]",
        "data.sources.words.text_column=content",
        "data.sources.words.min_tokens=4",
        "data.sources.numbers.fim_rate=0.5",
        f"data.cache_dir={folder / 'cache'}",
    ]


def lines(folder: Path, *keys: str) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in keys) for row in rows if "lm" in row]


def test_four_ranks_then_two_then_one_go_on_with_the_same_batches(
    corpus: Path, sources: list[str], tmp_path: Path
) -> None:
    every = [*sources, *PHASES, "train.save_every=1", "train.keep_last=9"]
    alone = run(corpus, tmp_path, "run.name=alone", *every)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert "phases" in alone.stdout and "1 to 3" in alone.stdout
    expected = lines(tmp_path / "alone", "step", "tokens", "lm", "mtp")
    assert [tokens for _, tokens, *_ in expected] == [128, 384, 768, 1280, 1792, 2304, 2816, 3328]
    at = tmp_path / "ranks" / "checkpoints"
    for stop, world in ((2, 4), (5, 2), (8, 1)):
        resume = [f"resume={newest(at)}"] if at.exists() else ["run.name=ranks"]
        part = run(corpus, tmp_path, *every, *resume, world=world)
        assert part.returncode == 0, part.stderr[-3000:]
        for step in at.glob("step-*"):  # as if the run had been killed after `stop`
            if int(step.name[5:]) > stop:
                shutil.rmtree(step)
    assert lines(tmp_path / "ranks", "step", "tokens") == [row[:2] for row in expected]
    found = lines(tmp_path / "ranks", "lm", "mtp")
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted[2:], rel=1e-5)


def newest(checkpoints: Path) -> Path:
    return max(checkpoints.glob("step-*"))


def test_data_that_changed_is_refused_unless_told_otherwise(
    corpus: Path, sources: list[str], tmp_path: Path
) -> None:
    every = [*sources, *PHASES, "train.steps=4", "run.name=a"]
    first = run(corpus, tmp_path, *every, "data.shuffle_shards=1")
    assert first.returncode == 0, first.stderr[-3000:]
    again = [*every, "data.shuffle_shards=1", "resume=auto", "train.steps=6"]
    for change, words in (
        ("train.seed=5", "train.seed"),
        ("data.sources.words.min_tokens=6", "data.sources.words.min_tokens"),
        ("data.tokenizer.vocab_size=290", "tokenizer"),
    ):
        refused = run(corpus, tmp_path, *again, change)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
    anew = run(corpus, tmp_path, *again, "data.sources.words.min_tokens=6", "data.on_change=restart")
    assert anew.returncode == 0, anew.stderr[-3000:]
    assert len(lines(tmp_path / "a", "step")) == 6

    # More text makes another BPE, which the model does not know: the checkpoint's is kept.
    more = tmp_path / "more.jsonl"
    more.write_text('{"content": "a text that was not there, with words of its own"}\n' * 3)
    words = next(option for option in sources if option.startswith("data.sources.words.files="))
    files = f"{words[:-1]},{more}]"
    refused = run(corpus, tmp_path, *again, files, "data.on_change=restart")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    keep = refused.stderr.rpartition("keep that one: ")[2].split()
    last = [*again, "data.sources.words.min_tokens=6", files, *keep]
    stopped = run(corpus, tmp_path, *last, "train.steps=7")
    assert stopped.returncode == 2 and "data.sources.words.files" in stopped.stderr
    gone_on = run(corpus, tmp_path, *last, "train.steps=7", "data.on_change=restart")
    assert gone_on.returncode == 0, gone_on.stderr[-3000:]
    assert len(lines(tmp_path / "a", "step")) == 7
