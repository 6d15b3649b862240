from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError
from data import sources
from data.config import DataConfig
from data.sources import Unit, cut, documents, find_units, read

TEXTS = [f"text {i} \u00e9\u4e2d\n" * (i + 1) for i in range(700)]


def all_documents(config: DataConfig) -> list[str]:
    units, _ = find_units(config)
    return [text for unit in units for batch in read(unit) for text in batch]


def write(kind: str, folder: Path) -> None:
    folder.mkdir()
    if kind == "text":
        for i, text in enumerate(TEXTS):
            path = folder / f"{i % 7}" / f"{i:03d}{('.txt', '.md', '.py')[i % 3]}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return
    for part, texts in enumerate((TEXTS[:300], TEXTS[300:])):
        lines = "".join(json.dumps({"n": i, "body": text}) + "\n" for i, text in enumerate(texts))
        if kind == "jsonl":
            (folder / f"{part}.jsonl").write_text(lines)
        elif kind == "gz":
            (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            pq.write_table(pa.table({"n": range(len(texts)), "body": texts}), folder / f"{part}.parquet")


@pytest.mark.parametrize("kind", ["text", "jsonl", "gz", "parquet"])
def test_every_document_of_a_folder_is_read_once(kind, tmp_path):
    write(kind, tmp_path / "in")
    config = DataConfig(path=str(tmp_path / "in"), text_column="body")
    assert sorted(all_documents(config)) == sorted(TEXTS)


def test_one_file_is_enough_and_holes_are_left_out(tmp_path):
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table({"text": ["a", None, "", "b"]}), path)
    assert all_documents(DataConfig(path=str(path))) == ["a", "b"]


def test_bytes_that_are_not_utf8_are_replaced(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert all_documents(DataConfig(path=str(tmp_path))) == ["caf\ufffd"]


def test_file_names_are_not_patterns(tmp_path):
    for name in ("a*.txt", "a?.txt", "[a].txt", "ab.txt"):
        (tmp_path / name).write_text(name)
    assert sorted(all_documents(DataConfig(path=str(tmp_path)))) == ["[a].txt", "a*.txt", "a?.txt", "ab.txt"]


def test_hidden_files_and_unknown_endings_are_left_out_and_counted(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in (".git/x.txt", ".hidden.txt", "seen.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    units, found = find_units(DataConfig(path=str(tmp_path)))
    assert [os.path.basename(f) for unit in units for f in unit.files] == ["seen.txt"]
    assert found == {"source_bytes": len("seen.txt"), "ignored_files": 1}


def bad_column(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"body": "x"}\n')


def numbers(folder: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), folder / "a.parquet")


def mixed(folder: Path) -> None:
    (folder / "a.txt").write_text("x")
    (folder / "a.jsonl").write_text('{"text": "x"}\n')


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda f: f.rmdir(), "data.path: .* does not exist"),
        (lambda f: None, "data.path: no file to read .* known endings"),
        (lambda f: (f / "a.png").write_text("x"), "data.path: no file to read"),
        (lambda f: (f / "a.txt").touch(), "data.path: every file .* is empty"),
        (mixed, r"data.path: .* mixes json \(a.jsonl\) and text \(a.txt\)"),
        (bad_column, "data.text_column: 'text' is not a column of .*a.jsonl; it has body"),
        (lambda f: pq.write_table(pa.table({"b": ["x"]}), f / "a.parquet"), "data.text_column: .* it has b"),
        (numbers, "data.text_column: 'text' of .*a.parquet holds int64, not text"),
        (
            lambda f: (f / "a.jsonl").write_text('{"text": "a"}\n{broken\n'),
            "data.path: .*a.jsonl cannot be read",
        ),
        (lambda f: (f / "a.jsonl.gz").write_text("no gzip"), "data.path: .*a.jsonl.gz cannot be read"),
        (lambda f: (f / "a.parquet").write_text("zz"), "data.path: .*a.parquet cannot be read"),
    ],
)
def test_wrong_input_is_one_line(prepare, says, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(ConfigError, match=f"^{says}") as caught:
        all_documents(DataConfig(path=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "jsonl", "gz", "parquet"])
def test_max_bytes_holds_and_takes_the_same_documents(kind, tmp_path):
    write(kind, tmp_path / "in")
    small, large = (
        all_documents(DataConfig(path=str(tmp_path / "in"), text_column="body", max_bytes=n))
        for n in (300_000, 900_000)
    )
    assert 0 < sum(len(t.encode()) for t in small) <= 300_000
    assert sum(len(t.encode()) for t in large) <= 900_000
    assert set(small) < set(large) < set(TEXTS)


def test_fingerprint_follows_content_not_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = find_units(DataConfig(path=str(tmp_path)))[0][0].fingerprint
    os.utime(path, (1, 1))
    assert find_units(DataConfig(path=str(tmp_path)))[0][0].fingerprint == before
    path.write_text("two")
    assert find_units(DataConfig(path=str(tmp_path)))[0][0].fingerprint != before


def test_small_files_share_units_and_a_long_text_is_cut_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    monkeypatch.setattr(sources, "DOCUMENT_CHARACTERS", 50)
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text("x" * 100)
    units, _ = find_units(DataConfig(path=str(tmp_path)))
    assert [len(unit.files) for unit in units] == [10] * 4
    text = "".join(f"line {i}\n" for i in range(40)) + "y" * 120
    pieces = list(cut(text))
    assert "".join(pieces) == text
    assert all(len(p) <= 50 for p in pieces)
    assert all(p.endswith("\n") for p in pieces[:-3])


def test_built_in_source_is_sorted_python_without_packages():
    units, found = find_units(DataConfig(max_bytes=400_000))
    files = [f for unit in units for f in unit.files]
    assert found["ignored_files"] == 0
    assert found["source_bytes"] > 10_000_000
    assert len(files) > 3
    assert all(f.endswith(".py") and os.path.getsize(f) <= 200_000 for f in files)
    assert find_units(DataConfig(max_bytes=400_000))[0] == units
    names = list(sources.python_files())
    assert {name.split("/")[0] for name in names} == {"python", "torch"}
    assert not any("site-packages" in name for name in names)


OFFLINE = """
import socket, sys
def refuse(*a, **k):
    print("network:", a, file=sys.stderr)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from data.config import DataConfig
from data.sources import find_units, read
for path in sys.argv[1:]:
    units, _ = find_units(DataConfig(path=path, text_column="body"))
    if "broken" not in path:
        assert sum(len(b) for u in units for b in read(u)) == 700, path
        continue
    try:
        list(read(units[0]))
    except ValueError as error:
        print(error)
"""


def test_local_files_touch_neither_network_nor_home(tmp_path):
    kinds = ["text", "jsonl", "gz", "parquet"]
    for kind in kinds:
        write(kind, tmp_path / kind)
    (tmp_path / "broken.jsonl").write_text('{"body": "a"}\n{broken\n')
    home = tmp_path / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | {"HOME": str(home)}
    command = [sys.executable, "-c", OFFLINE, *(str(tmp_path / kind) for kind in [*kinds, "broken.jsonl"])]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no attempt, and no line of the library's own
    assert len(done.stdout.splitlines()) == 1 and "broken.jsonl cannot be read" in done.stdout
    assert not [p for p in home.rglob("*") if p.is_file()]


def test_documents_stop_at_the_limit(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 10}) + "\n" for _ in range(9)))
    unit = Unit((str(tmp_path / "a.jsonl"),), "json", "text", 1, 35, "")
    assert [len(b) for b in read(unit)] == [3]
    assert len(list(documents(unit))) == 9
