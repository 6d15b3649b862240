"""What a team relies on: other numbers of ranks, damage, foreign checkpoints and diverging runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.runs import Ended, run
from train import checkpoint


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["lm"] for line in lines if "lm" in line]


def errors(result: Ended) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def two_ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `base`, by two ranks, with checkpoints at steps 3 and 6."""
    runs = tmp_path_factory.mktemp("runs")
    result = run(corpus, runs, "run.name=base", world=2)
    assert result.returncode == 0, result.stderr[-3000:]
    return runs / "base"


def test_another_number_of_ranks_goes_on_with_the_same_batches(two_ranks: Path, corpus: Path) -> None:
    before = losses(two_ranks)
    copy = shutil.copytree(two_ranks, two_ranks.with_name("alone"))
    result = run(corpus, copy.parent, f"resume={copy / 'checkpoints' / 'step-00000003'}")
    assert result.returncode == 0, result.stderr
    assert "changed ranks: 2 -> 1" in result.stdout
    assert losses(copy)[:3] == before[:3]
    assert losses(copy)[3:] == pytest.approx(before[3:], rel=1e-4)


def test_a_damaged_newest_checkpoint_is_skipped(two_ranks: Path, corpus: Path) -> None:
    copy = shutil.copytree(two_ranks, two_ranks.with_name("damaged"))
    file = sorted((copy / "checkpoints" / "step-00000006").glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    result = run(corpus, copy.parent, "run.name=damaged", "resume=auto", world=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("warning: ") == 1 and file.name in result.stdout
    assert "resume  " in result.stdout and "step-00000003" in result.stdout
    assert (copy / "metrics.jsonl").read_text() == (two_ranks / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["model=laptop", "model.swiglu_limit=9"], "model.swiglu_limit"),
        (["data.tokenizer.vocab_size=290"], "data.tokenizer"),
        (["data.fim_rate=0.5"], "fim_rate"),
        (["run.name=nothing", "resume=auto", "run.dir=/proc/nowhere"], "run.dir"),
    ],
)
def test_what_cannot_go_on_is_one_line(two_ranks: Path, corpus: Path, extra: list[str], words: str) -> None:
    before = (two_ranks / "metrics.jsonl").read_text()
    refused = run(corpus, two_ranks.parent, f"resume={two_ranks}", *extra)
    assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
    assert (two_ranks / "metrics.jsonl").read_text() == before
    assert len(checkpoint.all_steps(two_ranks / "checkpoints")) == 2


def test_a_newer_format_is_refused(two_ranks: Path, corpus: Path) -> None:
    copy = shutil.copytree(two_ranks, two_ranks.with_name("newer"))
    step = copy / "checkpoints" / "step-00000006"
    manifest = checkpoint.read_manifest(step)
    (step / checkpoint.MANIFEST).write_text(checkpoint.sealed_text({**manifest, "format": 2}))
    refused = run(corpus, copy.parent, f"resume={copy}")
    assert refused.returncode == 2 and "newer Fourfold" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_run_that_diverges_stops_on_every_rank_and_keeps_what_was_good(
    corpus: Path, tmp_path: Path
) -> None:
    diverging = ["optim.lr=1e25", "optim.warmup_steps=3", "train.save_every=1", "run.name=high"]
    result = run(corpus, tmp_path, *diverging, world=2)
    assert result.returncode != 0
    assert len(errors(result)) == 1 and "not finite" in errors(result)[0], result.stderr[-2000:]
    last = checkpoint.all_steps(tmp_path / "high" / "checkpoints")[-1]
    assert str(last) in errors(result)[0]
    checkpoint.verify(last)
