from __future__ import annotations

import io
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from data.config import DataConfig, Shape, SourceConfig, TokenizerConfig
from data.findings import EDGE, Findings, Stage, bins, histogram, look, runs
from data.inspect import bar, few, grids, main, quantiles, show
from data.opening import open_data
from data.page import page, short
from data.shards import document_key

ROOT = Path(__file__).parents[3]
FRACTION = 0.1
DANGEROUS = (
    "<script>alert(1)</script> [red]r[/red] :smile: \x1b[31m\x07 \u202e \r\n<｜end▁of▁sentence｜> é中\u3000!"
)


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def words(count: int, longest: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefgh", k=draw.randrange(1, 7))) for _ in range(200)]
    return [f"{i} " + " ".join(draw.choices(vocabulary, k=draw.randrange(1, longest))) for i in range(count)]


SHORT = words(300, 15, 1)
LONG = words(80, 400, 2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources: short documents, every third of them twice, and long ones, with weights 3 to 1."""
    folder = tmp_path_factory.mktemp("inspect")
    sources = {
        "short": SourceConfig(
            files=[write_rows(folder / "short.jsonl", [*SHORT, *SHORT[::3]])],
            weight=3.0,
            deduplicate=True,
            min_tokens=12,
        ),
        "long": SourceConfig(files=[write_rows(folder / "long.jsonl", [*LONG, DANGEROUS * 3])], fim_rate=0.5),
    }
    return DataConfig(
        sources=sources,
        validation_fraction=FRACTION,
        cache_dir=str(folder / "cache"),
        tokenizer=TokenizerConfig(vocab_size=500),
    )


STAGES = [
    Stage("one", 64, 64 * 400, {"short": 3.0, "long": 1.0}),
    Stage("two", 128, 128 * 300, {"long": 1.0}),
]


def plan(step: int) -> Shape:
    """The stages in steps of ten sequences."""
    stage = STAGES[step >= 40]
    return Shape(10, stage.seq_len, stage.weights)


@pytest.fixture(scope="module")
def found(config: DataConfig) -> Findings:
    return look(config, STAGES, seed=5, count=10, say=print)


@pytest.fixture(scope="module")
def data(config: DataConfig):
    return open_data(config, plan, mtp_depth=0, seed=5)


def test_documents_tokens_and_lengths_are_those_of_the_texts(found, data):
    encoded = {
        text: len(data.tokenizer.encode_batch([text])[0]) + 1 for text in [*SHORT, *LONG, DANGEROUS * 3]
    }
    threshold = int(FRACTION * 2**64)
    short, long = found.holdings
    kept = {text for text in SHORT if encoded[text] > 12}
    held_out = {text for text in kept if document_key(text) < threshold}
    assert 0 < len(held_out) < len(kept) < len(SHORT)
    assert sorted(short.lengths) == sorted(encoded[text] for text in kept - held_out)
    assert (short.documents, short.held_out) == (400, len(held_out))
    assert short.tokens == sum(encoded[text] for text in [*SHORT, *SHORT[::3]])
    assert short.bytes == sum(len(text.encode()) for text in [*SHORT, *SHORT[::3]])
    assert (short.shards, short.ready, short.scale, found.notes) == (1, 1, 1.0, [])
    assert len(long.lengths) + long.held_out == long.documents == 81
    row = grids(found)[0].rows[0]
    left_out = 400 - len(kept)
    assert row[:2] + row[3:] == ["short", "1/1", *map(str, (len(kept - held_out), len(held_out), left_out))]


def test_packing_is_that_of_a_pass_over_the_data(found, config):
    for packing in found.packings:
        alone = DataConfig(
            sources={packing.source: config.sources[packing.source]},
            validation_fraction=FRACTION,
            cache_dir=config.cache_dir,
            tokenizer=TokenizerConfig("file", path=str(tokenizer_file(config)), vocab_size=500),
        )
        stage = packing.stage
        loader = open_data(alone, lambda step, s=stage: Shape(1, s.seq_len), mtp_depth=0, seed=5).train
        batches = list(loader.one_pass(1, stage.seq_len))
        assert packing.efficiency == pytest.approx(
            np.mean([(b["document_ids"] >= 0).float().mean() for b in batches])
        )
        assert packing.documents == pytest.approx(
            np.mean([int(b["document_ids"].max()) + 1 for b in batches])
        )
        lengths = next(h.lengths for h in found.holdings if h.source == packing.source)
        assert packing.cut == np.mean(lengths > stage.seq_len)
    assert [p.cut > 0 for p in found.packings] == [False, True, True]
    assert found.packings[0].documents > 2


def tokenizer_file(config: DataConfig) -> Path:
    return next(Path(config.cache_dir).glob("bpe-*.json"))


def test_shares_and_epochs_are_those_of_the_run(found, data):
    assert [(p.stage.name, p.source, p.share) for p in found.packings] == [
        ("one", "short", 0.75),
        ("one", "long", 0.25),
        ("two", "long", 1.0),
    ]
    real = sum(int((data.train.batch()["document_ids"] >= 0).sum()) for _ in range(70))
    assert sum(map(found.taken, found.holdings)) == pytest.approx(real, rel=0.01)
    cursors = {name: s["cursor"] for name, s in data.train.state_dict()["sources"].items()}
    for held in found.holdings:
        assert found.epochs(held) > 1
        assert int(found.epochs(held)) == cursors[held.source][0]
    shares = [float(row[2].rstrip("%")) for row in grids(found)[2].rows]
    assert shares[0] == pytest.approx(100 * 300 * 64 / (400 * 64 + 300 * 128), abs=1)
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_sequences_are_the_first_of_training(found, config):
    data = open_data(config, plan, mtp_depth=0, seed=5)
    batch = data.train.batch()
    expected = []
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        parts = [ids[documents == d].tolist() for d in range(int(documents.max()) + 1)]
        expected.append([(len(part), list(runs(np.array(part), data.tokenizer))) for part in parts])
    shown = [[(document.tokens, document.runs) for document in s.documents] for s in found.samples]
    assert sorted(shown) == sorted(expected)
    assert {s.source for s in found.samples} == {"short", "long"}
    for sample in found.samples:
        assert sample.padding == 64 - sum(box.tokens for box in sample.boxes)
        for box, document in zip(sample.boxes, sample.documents, strict=True):
            assert box.whole != any("cut" in mark for mark in document.marks)


def test_any_sequences_of_the_run_may_be_shown(config):
    """By their numbers, here over a switch to longer ones of one source: what the loader hands out."""
    whole = look(config, STAGES, seed=5, count=450, say=print)
    assert [s.number for s in whole.samples] == list(range(1, 451))
    some = look(config, STAGES, seed=5, count=10, first=421, say=print)
    assert some.samples == whole.samples[420:430]
    data = open_data(config, plan, mtp_depth=0, seed=5)
    for _ in range(43):
        batch = data.train.batch()
    assert data.train.handed_out == 430
    sizes = [[d.tokens for d in sample.documents] for sample in some.samples]
    found = [torch.bincount(row[row >= 0]).tolist() for row in batch["document_ids"]]
    assert sorted(found) == sorted(sizes) and len(some.samples[0].documents) < 24


def test_rearranged_documents_say_so(config):
    found = look(config, [Stage("", 2048, 2048 * 20, {"long": 1.0})], seed=5, count=20, say=print)
    documents = [document for sample in found.samples for document in sample.documents]
    rearranged = [d for d in documents if "rearranged for fill-in-the-middle" in d.marks]
    assert 0.3 < len(rearranged) / len(documents) < 0.7
    for document in documents:
        has_marks = any("fim" in text for text, kind in document.runs if kind == "mark")
        assert has_marks == (document in rearranged)


def test_runs_tell_marks_from_text_that_spells_them_out(data):
    tokenizer = data.tokenizer
    ids = np.append(tokenizer.encode_batch([DANGEROUS])[0], tokenizer.eos_id)
    found = list(runs(ids, tokenizer))
    assert found[-1] == ("<｜end▁of▁sentence｜>", "mark")
    assert [text for text, kind in found if kind == "hidden"] == ["\\x1b", "\\x07", "\\u202e", "\\r"]
    plain = "".join(text for text, kind in found if kind == "text")
    assert "<script>" in plain and "\n<｜end▁of▁sentence｜> é中\u3000!" in plain
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(plain)


def test_long_text_is_shortened_in_the_middle(data):
    ids = data.tokenizer.encode_batch([" ".join(LONG)])[0]
    (begin, _), (gap, kind), (end, _) = runs(ids, data.tokenizer)
    assert (begin, end) == (data.tokenizer.decode(ids[:EDGE]), data.tokenizer.decode(ids[-EDGE:]))
    assert kind == "gap" and f"{len(ids) - 2 * EDGE:,} tokens" in gap
    assert [kind for _, kind in runs(ids[: 3 * EDGE], data.tokenizer)] == ["text"]


@pytest.mark.parametrize("per_octave", [1, 3, 8])
def test_every_length_is_in_one_bin(per_octave):
    lengths = np.array([1, 1, 2, 3, 7, 8, 64, 100, 1024], np.uint32)
    borders = bins(1024, per_octave)
    assert borders[0] == 1 and borders[-2] <= 1024 < borders[-1] and (np.diff(borders) > 0).all()
    counts, tokens = histogram(lengths, borders)
    assert counts.sum() == len(lengths) and tokens.sum() == lengths.sum()
    assert counts[-1] == 1 and tokens[0] == 2


def test_small_parts():
    assert quantiles(np.arange(1, 101)) == ["10", "50", "90", "100"]
    assert quantiles(np.array([7])) == ["7"] * 4 and quantiles(np.zeros(0)) == ["-"] * 4
    assert [few(n) for n in (0.00123, 0.5, 12.345, 1234.4)] == ["0.0012", "0.50", "12.35", "1,234"]
    assert [short(n) for n in (7, 999, 999_600, 1_234_000, 5e13)] == ["7", "999", "1M", "1.23M", "50T"]
    assert (bar(1), bar(0.5), bar(1 / 160), bar(0)) == ("█" * 20, "█" * 10, "▏", "")


def dangerous(config: DataConfig) -> Findings:
    """Findings whose samples hold the dangerous document."""
    found = look(config, [Stage("<b>", 512, 512 * 100, {"long": 1.0})], seed=5, count=100, say=print)
    samples = [s for s in found.samples if any("script" in text for d in s.documents for text, _ in d.runs)]
    assert samples
    return Findings(found.stages, found.holdings, found.packings, samples, ["a <note>"])


def test_terminal_shows_documents_as_they_are(config):
    console = Console(
        file=io.StringIO(), width=100, force_terminal=True, highlight=False, markup=False, emoji=False
    )
    show(dangerous(config), console)
    text = console.file.getvalue()
    assert "[red]r[/red] :smile: " in text and "a <note>" in text
    assert "\x1b[31m\x07" not in text and not {"\x07", "\u202e", "\r"} & set(text)
    assert "\\x1b" in text and "\\u202e" in text and "█" in text


class Balanced(HTMLParser):
    """Checks that tags are closed in order; keeps tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_escaped(config, found):
    text = page(dangerous(config), "data.path=<x>")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    tags = {tag for tag, _ in parser.seen}
    assert {"svg", "table", "article", "polyline", "rect"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "b>", "note", "x", "red"}
    assert not {"src", "onclick", "onload"} & {name for _, attributes in parser.seen for name in attributes}
    links = {a["href"] for _, a in parser.seen if "href" in a}
    assert links and all(link.startswith("#") for link in links)
    assert links <= {f"#{a['id']}" for _, a in parser.seen if "id" in a} | {"#s1-25"}
    assert "http" not in text and "@import" not in text and "url(" not in text
    for part in ("&lt;script&gt;alert", "[red]r[/red]", "a &lt;note&gt;", "data.path=&lt;x&gt;", "&lt;b&gt;"):
        assert part in text
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(text)
    assert page(found, "").count("<polyline") == 2 + 2  # a line of tokens each, and what they sum up to


def test_shuffled_shards_are_counted_as_far_as_they_are_ready(tmp_path):
    (tmp_path / "rows").mkdir()
    for i in range(4):
        write_rows(tmp_path / "rows" / f"{i}.jsonl", words(60, 30, i))

    def findings(cache: str, shuffle_shards: int | None) -> Findings:
        config = DataConfig(
            path=str(tmp_path / "rows"),
            shuffle_shards=shuffle_shards,
            cache_dir=str(tmp_path / cache),
            tokenizer=TokenizerConfig(vocab_size=400),
        )
        return look(config, [Stage("", 64, 64 * 100, {"text": 1.0})], seed=0, count=1, say=print)

    some = findings("some", 2)
    (held,) = some.holdings
    assert (held.ready, held.shards, held.documents) == (1, 4, 60)
    assert 3 < held.scale < 5 and len(some.notes) == 2 and "1 of 4 shards" in some.notes[0]
    assert grids(some)[2].rows[0][-1].startswith("~")
    assert findings("some", 2).holdings[0].ready == 1
    assert findings("some", 1).notes == some.notes[:1]  # the first group is there

    everything = findings("some", None)
    assert (everything.holdings[0].ready, everything.holdings[0].scale, everything.notes) == (4, 1.0, [])
    assert some.epochs(held) == pytest.approx(everything.epochs(everything.holdings[0]), rel=0.2)
    assert findings("some", 2).notes == []


def test_copies_in_two_sources_share_a_shard(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", SHORT)
    config = DataConfig(
        sources={name: SourceConfig(files=[str(tmp_path / name)]) for name in "ab"},
        cache_dir=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(vocab_size=400),
    )
    first, second = look(
        config, [Stage("", 64, 6400, {"a": 1.0, "b": 1.0})], seed=0, count=0, say=print
    ).holdings
    assert first.ready == second.ready == 1 and first.lengths.tolist() == second.lengths.tolist()
    assert len(list((tmp_path / "cache" / "shards").glob("*.arrow"))) == 1


def test_command_prints_and_writes_and_needs_no_source_again(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(LONG):
        (texts / f"{i}.txt").write_text(text)
    arguments = [
        f"data.path={texts}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.tokenizer.vocab_size=400",
    ]
    html = tmp_path / "page.html"
    command = [sys.executable, "-m", "data.inspect", *arguments, "--html", str(html), "--sequences", "3"]
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    for part in ("epochs", "efficiency", "█", "sequence 3 of the run: 512 tokens", "━━", str(html)):
        assert part in ran.stdout
    assert "sequence 4" not in ran.stdout
    assert html.read_text().endswith("</html>\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "page.html", "texts"]

    shutil.rmtree(texts)
    assert main([*arguments, "--sequences=0"]) == 0
    out = capsys.readouterr()
    assert "going on with the shards" in out.err and "sequence 1" not in out.out and "epochs" in out.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.pth=x"], "data.path"),
        (["--html", "nowhere/page.html"], "nowhere is no folder"),
        (["--sequences", "x"], "--sequences"),
        (["--sequences=-1"], "0 or more"),
        (["--first=0"], "1 or more"),
        (["--html"], "--help"),
        (["data.path=not/there"], "data.path: not/there does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys, tmp_path):
    assert main([f"data.cache_dir={tmp_path}", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and words in line and line.count("\n") == 1


def test_help_teaches(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--html" in text and "efficiency" in text and max(map(len, text.splitlines())) <= 110


def test_it_does_not_pass_for_the_inspect_of_python():
    with pytest.raises(SystemExit, match="python -m"):
        runpy.run_path(str(ROOT / "data" / "inspect.py"), run_name="inspect")
