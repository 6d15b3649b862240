from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data import sources
from data.shards import Documents, document_key, open_shards, shard_path
from data.sources import find_units
from data.tokenizer import Tokenizer, train_bpe

ROOT = Path(__file__).parents[3]
WORDS = ["abc abd acb bca cab bac abcd dcba abab acdc "] * 9


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    path = tmp_path / "bpe.json"
    path.write_text(train_bpe(iter(WORDS), 280))
    return Tokenizer(path)


@pytest.fixture
def units(config, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    units, _ = find_units(config)
    assert len(units) > 5
    return units


def open_(units, tokenizer, folder: Path) -> Documents:
    folder.mkdir(exist_ok=True)
    return Documents(open_shards(units, tokenizer, folder, progress=False))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".arrow", ".json")}


def test_shards_hold_every_document_with_its_end_mark(units, tokenizer, texts, tmp_path):
    documents = open_(units, tokenizer, tmp_path / "s")
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "bpe.json"))
    expected = [[*oracle.encode(texts[name]).ids, 1] for name in sorted(texts)]
    assert [ids.tolist() for ids in documents] == expected
    assert documents.lengths.tolist() == [len(ids) for ids in expected]
    assert documents.keys.tolist() == [document_key(texts[name]) for name in sorted(texts)]
    manifests = [json.loads(p.read_text()) for p in (tmp_path / "s").glob("*.json")]
    assert sum(m["tokens"] for m in manifests) == documents.lengths.sum()
    assert sum(m["bytes"] for m in manifests) == sum(len(t.encode()) for t in texts.values())


def test_documents_are_views_and_choices_too(units, tokenizer, tmp_path):
    documents = open_(units, tokenizer, tmp_path / "s")
    assert not documents[3].flags.owndata and not documents[3].flags.writeable
    mask = np.arange(len(documents)) % 3 == 0
    chosen = documents.choose(mask)
    assert [c.tolist() for c in chosen] == [documents[i].tolist() for i in np.flatnonzero(mask)]
    assert np.shares_memory(chosen[1], documents[3])
    assert chosen.fingerprint != documents.fingerprint


def test_a_second_run_tokenizes_nothing_and_another_tokenizer_everything(
    units, tokenizer, tmp_path, monkeypatch
):
    open_(units, tokenizer, tmp_path / "s")
    count = len(contents(tmp_path / "s"))
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenized again"))
        open_(units, tokenizer, tmp_path / "s")
    (tmp_path / "other.json").write_text(train_bpe(iter(WORDS), 270))
    open_(units, Tokenizer(tmp_path / "other.json"), tmp_path / "s")
    assert len(contents(tmp_path / "s")) == 2 * count


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").write_text("{}"),
    ],
    ids=["bit", "torn", "gone", "no manifest", "torn manifest", "empty manifest"],
)
def test_a_damaged_shard_is_built_again_alone(damage, units, tokenizer, tmp_path, monkeypatch):
    open_(units, tokenizer, tmp_path / "s")
    before = contents(tmp_path / "s")
    damage(shard_path(units[2], tokenizer, tmp_path / "s"))
    built = []
    monkeypatch.setattr("data.shards.read", lambda unit: built.append(unit) or sources.read(unit))
    open_(units, tokenizer, tmp_path / "s")
    assert built == [units[2]]
    assert contents(tmp_path / "s") == before


BUILD = """
import sys, time
from pathlib import Path
from data import sources
from data.config import DataConfig
from data.shards import open_shards
from data.tokenizer import Tokenizer
sources.UNIT_BYTES = 5000
encode = Tokenizer.encode_batch
def slow(self, texts):
    time.sleep(0.15)
    return encode(self, texts)
Tokenizer.encode_batch = slow
texts, tokenizer, folder = sys.argv[1:]
units, _ = sources.find_units(DataConfig(path=texts))
open_shards(units, Tokenizer(Path(tokenizer)), Path(folder), progress=False)
"""


def start_build(config, tmp_path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, config.path, str(tmp_path / "bpe.json"), str(folder)]
    return subprocess.Popen(command, cwd=ROOT)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_build_killed_at_any_moment_goes_on(config, units, tokenizer, tmp_path):
    open_(units, tokenizer, tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    process = start_build(config, tmp_path, folder)
    wait_for(lambda: len(list(folder.glob("*.json"))) >= 2 and list(folder.glob(".*.tmp")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    sealed = {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    assert 2 <= len(sealed) < len(units)
    documents = open_(units, tokenizer, folder)
    assert contents(folder) == contents(tmp_path / "whole")
    assert not list(folder.glob(".*.tmp"))
    assert all(p.stat().st_mtime_ns == then for p, then in sealed.items())
    assert documents.fingerprint == open_(units, tokenizer, tmp_path / "whole").fingerprint


def test_a_second_process_waits_and_builds_nothing(config, units, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "shared"
    folder.mkdir()
    process = start_build(config, tmp_path, folder)
    wait_for(lambda: list(folder.glob("*.json")), process)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenized twice"))
    documents = open_(units, tokenizer, folder)
    assert process.wait() == 0
    assert len(documents) == 120
