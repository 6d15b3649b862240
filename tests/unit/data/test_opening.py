"""Batches are the same whenever and wherever shards are made, and who cannot have them is told why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from data import remote
from data.build import Beside, Supply
from data.config import DataConfig, Shape, SourceConfig, TokenizerConfig
from data.opening import Data, open_data
from data.sources import find_units
from data.tokenizer import train_bpe
from tests.http_server import Server, serve
from tests.unit.data.written import KINDS, write_file

ROOT = Path(__file__).parents[3]
UNITS = 6
BATCHES = 12  # more than an epoch


@pytest.fixture
def source(tmp_path) -> Path:
    for i in range(UNITS):
        texts = [f"{i} {j} é " + "some words " * (j % 20) for j in range(30)]
        write_file(tmp_path / "in" / f"{i}.jsonl", texts)
    return tmp_path / "in"


@pytest.fixture
def server(source, monkeypatch) -> Iterator[Server]:
    for name, seconds in {"FIRST_WAIT": 0.02, "LONGEST_WAIT": 0.05, "READ_SECONDS": 0.3}.items():
        monkeypatch.setattr(remote, name, seconds)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    with serve(source) as server:
        yield server


def configuration(home: Path, *files: object, **fields) -> DataConfig:
    """One source `x` of these files; the tokenizer is a file, so that nothing is read beforehand."""
    tokenizer = home / "bpe.json"
    if not tokenizer.exists():
        tokenizer.write_text(train_bpe(iter(["some words " * 99]), 300))
    source = SourceConfig(files=[str(file) for file in files], text_column="body")
    own: dict[str, Any] = {
        "sources": {"x": source},
        "validation_fraction": 0.1,
        "workers": 1,
        "patience_minutes": 0.2,
        "cache_dir": str(home / "cache"),
        "tokenizer": TokenizerConfig("file", str(tokenizer), 300),
    }
    return DataConfig(**(own | fields))


def opened(config: DataConfig, said: list[str] | None = None) -> Data:
    say = (lambda text: pytest.fail(text)) if said is None else said.append
    return open_data(config, lambda step: Shape(4, 256), mtp_depth=1, seed=7, say=say)


def batches(data: Data, count: int = BATCHES) -> list[torch.Tensor]:
    """Of both sides."""
    train = [data.train.batch() for _ in range(count)]
    valid = list(data.valid.one_pass(2, 256))
    return [batch[key] for batch in (*train, *valid) for key in ("input_ids", "document_ids")]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def listed(config: DataConfig) -> list[str]:
    """The files in the order in which their shards are needed."""
    return [unit.files[0] for unit in find_units("x", config.sources["x"], config, print).units]


def child_of(data: Data) -> subprocess.Popen:
    supply = data.close.__self__  # type: ignore[attr-defined]
    assert isinstance(supply, Supply) and supply._child
    return supply._child


def alive(pid: int) -> bool:
    stat = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(stat.strip()) and "Z" not in stat


# --- Copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "file"])
def test_a_copy_of_the_cache_is_enough(kind, source, tmp_path, monkeypatch):
    """Without the source, in another folder, nothing is made."""
    config = configuration(tmp_path, source)
    if kind == "bpe":
        config = replace(config, tokenizer=TokenizerConfig(vocab_size=300))
    wanted = batches(opened(config))
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    shutil.rmtree(source)
    monkeypatch.setattr("data.build.build", lambda *_, **__: pytest.fail("a shard was made"))
    said: list[str] = []
    data = opened(replace(config, cache_dir=str(tmp_path / "elsewhere")), said)
    assert same(batches(data), wanted)
    assert said == [f"data.sources.x: {source} does not exist; going on with the shards that were made of it"]
    assert not (tmp_path / "cache").exists()


def test_a_copy_of_the_cache_asks_no_server(source, tmp_path, server, monkeypatch):
    config = configuration(tmp_path, server.url(f"{{0..{UNITS - 1}}}.jsonl"))
    wanted = batches(opened(config))
    server.down()
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    assert same(batches(opened(replace(config, cache_dir=str(tmp_path / "elsewhere")))), wanted)


def test_a_flipped_byte_changes_no_batch(source, tmp_path):
    config = configuration(tmp_path, source)
    wanted = batches(opened(config))
    for number, path in enumerate(sorted((tmp_path / "cache" / "shards").glob("*.arrow"))):
        data = bytearray(path.read_bytes())
        data[(2 * number + 1) * len(data) // (2 * UNITS)] ^= 4
        path.with_name("draft").write_bytes(data)
        os.replace(path.with_name("draft"), path)
    said: list[str] = []
    assert same(batches(opened(config, said)), wanted)
    assert said and all(" is damaged; it is made anew from " in line for line in said)


# --- Servers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_on_a_failing_server_gives_the_batches_of_the_file(kind, source, tmp_path, server):
    write_file(source / f"all.{kind}", [f"{j} é " + "some words " * (j % 60) for j in range(200)])
    if kind == "txt":  # a file is a document, and two are needed
        (source / "all.txt").write_text("some words\n" * 20_000)
    wanted = batches(opened(configuration(tmp_path, source / f"all.{kind}")))
    server.fail(f"all.{kind}", "status", code=503)  # of the first request: what is the file?
    for fault in ("cut", "stall", "down"):
        server.fail(f"all.{kind}", fault, skip=1, **({"seconds": 0.1} if fault == "down" else {}))
    said: list[str] = []
    config = configuration(tmp_path, server.url(f"all.{kind}"), cache_dir=str(tmp_path / "there"))
    assert same(batches(opened(config, said)), wanted)
    assert not server.pending()
    assert "HTTP 503" in said[0] and len(said) >= 3
    assert all(f"/all.{kind}: " in line and "next try in" in line for line in said)


def test_many_files_on_a_failing_server_give_the_batches_of_a_good_one(source, tmp_path, server):
    pattern = server.url(f"{{0..{UNITS - 1}}}.jsonl")
    wanted = batches(opened(configuration(tmp_path, pattern)))
    for i, fault in enumerate(("status", "cut", "stall", "drop", "short", "astray")):
        server.fail(f"{i}.jsonl", fault, times=2, skip=i % 2)
    said: list[str] = []
    config = configuration(tmp_path, pattern, cache_dir=str(tmp_path / "again"))
    assert same(batches(opened(config, said)), wanted)
    assert not server.pending() and len(said) >= 4


def test_a_server_that_stays_away_is_one_line(source, tmp_path, server):
    config = configuration(tmp_path, server.url("0.jsonl"), patience_minutes=0.002)
    server.fail("0.jsonl", "status", code=500, times=999, skip=1)
    said: list[str] = []
    with pytest.raises(
        ConfigError, match=r"0.jsonl could not be read for 0 s: HTTP 500 .*data.patience_minutes"
    ):
        opened(config, said)
    assert said and server.pending()


# --- Shards that are made beside the training -------------------------------------------------------------


def test_training_begins_before_its_shards_are_there(source, tmp_path, monkeypatch):
    """The batches are those of a run that has waited for everything; names may be relative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.build.PATIENT_SILENCE", 60.0)
    ready = configuration(tmp_path, source, shuffle_shards=1)
    opened(replace(ready, shuffle_shards=None)).close()
    data = opened(ready)
    assert data.summary["shards_ready"] == UNITS
    wanted = batches(data)
    said: list[str] = []
    tokenizer = replace(ready.tokenizer, path="bpe.json")
    live = configuration(tmp_path, "in", shuffle_shards=1, cache_dir="live", workers=2, tokenizer=tokenizer)
    began = time.monotonic()
    data = opened(live, said)
    assert time.monotonic() - began < 5
    assert (data.summary["shards_ready"], data.summary["shards"]) == (0, UNITS)
    assert same(batches(data), wanted)
    assert child_of(data).wait(20) == 0
    data.close()
    assert said == []
    names = {path.name for path in (tmp_path / "live" / "shards").iterdir()}
    assert names == {path.name for path in (tmp_path / "cache" / "shards").iterdir()}
    assert not list((tmp_path / "live").glob("failed-*"))


def test_a_broken_source_reaches_the_training(source, tmp_path):
    """After the batches of the shards that could be made."""
    config = configuration(tmp_path, source, shuffle_shards=1)
    broken = listed(config)[2]
    Path(broken).write_text("{broken")
    made_before = listed(config).index(broken)  # its hash is another one now
    said: list[str] = []
    data = opened(config, said)
    got = 0
    with pytest.raises(ConfigError, match=r"jsonl cannot be read as json: ") as caught:
        while True:
            data.train.batch()
            got += 1
    assert "\n" not in str(caught.value)
    assert (got > 0) == (made_before > 0)
    assert said == []
    with pytest.raises(ConfigError, match=r"jsonl cannot be read as json: "):  # and goes on saying so
        while True:
            data.train.batch()


def test_a_builder_that_dies_is_one_line(source, tmp_path, server):
    server.fail("0.jsonl", "hang", times=99, skip=1)
    data = opened(configuration(tmp_path, server.url("0.jsonl"), shuffle_shards=1), [])
    child_of(data).kill()
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"^the process that tokenizes was killed \(-9\); "):
        data.train.batch()
    assert time.monotonic() - began < 5


PROGRAM = """
import sys, time
from data.build import Beside, Maker, Supply
from data.tokenizer import Tokenizer

order = Beside.from_json(sys.stdin.readline())
folder = order.note.parent
supply = Supply(order.tasks, Tokenizer(order.tokenizer), order.config, folder, builder=True, say=print)
supply.start()
print(supply._child.pid, flush=True)
time.sleep(99)
"""


def test_a_builder_ends_with_the_training(source, tmp_path, server):
    """Also with one that is killed, and in the middle of a shard."""
    server.fail("0.jsonl", "hang", times=99, skip=1)
    config = configuration(tmp_path, server.url("0.jsonl"), shuffle_shards=1)
    data = opened(config, [])
    tasks = data.close.__self__._tasks  # type: ignore[attr-defined]
    began = time.monotonic()
    data.close()
    assert not alive(child_of(data).pid) and time.monotonic() - began < 5

    order = Beside(config, tasks, data.tokenizer.path, False, tmp_path / "note")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    process.stdin.write(order.to_json() + "\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    deadline = time.monotonic() + 30
    asked = len(server.requests)
    while len(server.requests) == asked:  # until it reads the file
        assert time.monotonic() < deadline and alive(child)
        time.sleep(0.02)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    deadline = time.monotonic() + 3
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
