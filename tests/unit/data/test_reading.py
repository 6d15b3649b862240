from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs.errors import ConfigError
from data import reading, remote, sources
from data.config import DataConfig, SourceConfig
from data.reading import cut, read
from data.sources import Unit, find_units
from tests.http_server import Server, serve
from tests.unit.data.written import KINDS, ROW_GROUP, write_file, write_folder

draw = random.Random(0)
TEXTS = [f"{i} é中\n" + "".join(draw.choices("abc \n", k=draw.choice([9, 90, 900]))) for i in range(150)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Of the folder; what waits for it waits less."""
    for name, seconds in {"FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.03, "READ_SECONDS": 0.3}.items():
        monkeypatch.setattr(remote, name, seconds)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    with serve(folder) as server:
        yield server


def units_of(place: object, cache: Path, column: str = "body") -> list[Unit]:
    source = SourceConfig(files=[str(place)], text_column=column)
    return find_units("x", source, DataConfig(cache_dir=str(cache)), print).units


def texts_of(unit: Unit, **options) -> list[str]:
    return [text for batch in read(unit, **options) for text in batch]


def unit(path: Path, builder: str = "json", limit: int | None = None) -> Unit:
    return Unit((str(path),), builder, "body", 1, limit, None, (), "")


# --- Documents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_of_a_folder_is_read_once(kind, folder, tmp_path):
    write_folder(folder, kind, TEXTS)
    found = [texts_of(unit) for unit in units_of(folder, tmp_path)]
    assert sorted(text for texts in found for text in texts) == sorted(TEXTS)
    files = [[text for text in TEXTS if text in texts] for texts in found]
    assert found == files  # each in order


@pytest.mark.parametrize("where", ["here", "server"])
def test_ranges_of_row_groups_are_the_file(where, folder, tmp_path, server, monkeypatch):
    write_file(folder / "a.parquet", TEXTS)
    metadata = pq.read_metadata(folder / "a.parquet")
    size = sum(metadata.row_group(i).column(1).total_uncompressed_size for i in range(8))
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", size // 4)
    units = units_of(folder if where == "here" else server.url("a.parquet"), tmp_path)
    ranges = {unit.row_groups: texts_of(unit) for unit in units}
    assert len(ranges) > 2
    for (first, stop), texts in ranges.items():
        assert texts == TEXTS[first * ROW_GROUP : stop * ROW_GROUP]
    assert [text for at in sorted(ranges) for text in ranges[at]] == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
def test_holes_and_empty_documents_are_left_out(kind, folder):
    write_file(folder / f"a.{kind}", ["a", None, "", "b", None])
    builder = {"jsonl": "json"}.get(kind, kind)
    assert texts_of(unit(folder / f"a.{kind}", builder)) == ["a", "b"]
    write_file(folder / f"a.{kind}", [None, None])
    assert texts_of(unit(folder / f"a.{kind}", builder)) == []


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_without_rows_has_no_document(kind, folder):
    write_file(folder / f"a.{kind}", [])
    assert texts_of(unit(folder / f"a.{kind}", kind)) == []


def test_a_column_of_large_strings(folder):
    pq.write_table(pa.table({"body": pa.array(["a", "b"], pa.large_string())}), folder / "a.parquet")
    assert texts_of(unit(folder / "a.parquet", "parquet")) == ["a", "b"]


def test_lines_need_not_have_the_same_fields(folder):
    lines = ['{"body": "a", "x": 1}', '{"x": null, "body": "b\\u00e9\\n"}', '{"body": "c", "y": [{}]}']
    (folder / "a.jsonl").write_text("\n".join(lines))  # and no line end after the last
    assert texts_of(unit(folder / "a.jsonl")) == ["a", "bé\n", "c"]


def test_bytes_that_are_not_utf8_are_replaced(folder, tmp_path):
    (folder / "latin.txt").write_bytes(b"caf\xe9 \xf0\x9f")
    (found,) = units_of(folder, tmp_path)
    assert texts_of(found) == ["caf\ufffd \ufffd"]


def test_text_files_of_a_unit_are_documents_in_the_order_of_their_names(folder, tmp_path):
    for name in ("b", "a/z", "a-", "c"):
        write_file(folder / f"{name}.txt", [f"I am {name}, " * 9])
    (found,) = units_of(folder, tmp_path)
    assert [text.partition(",")[0] for text in texts_of(found)] == [
        f"I am {name}" for name in ("a-", "a/z", "b", "c")
    ]


def test_a_long_text_is_cut_at_lines(folder, tmp_path, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(40)) + "y" * 120
    (folder / "a.txt").write_text(text)
    monkeypatch.setattr(reading, "DOCUMENT_CHARACTERS", 50)
    (found,) = units_of(folder, tmp_path)
    pieces = texts_of(found)
    assert "".join(pieces) == text
    assert all(len(p) <= 50 for p in pieces)
    assert all(p.endswith("\n") for p in pieces[:-3])
    assert pieces[-3:] == ["y" * 50, "y" * 50, "y" * 20]
    assert list(cut("x" * 50)) == ["x" * 50] and list(cut("x" * 51)) == ["x" * 50, "x"]
    write_file(folder / "b.jsonl", [text])
    assert texts_of(unit(folder / "b.jsonl")) == [text]  # a row is one document, however long


def test_batches_are_of_about_one_size(folder, monkeypatch):
    monkeypatch.setattr(reading, "BATCH_CHARACTERS", 1000)
    write_file(folder / "a.jsonl", ["x" * 300] * 10 + ["y" * 5000] + ["z"] * 5)
    batches = [[len(text) for text in batch] for batch in read(unit(folder / "a.jsonl"))]
    assert batches == [[300] * 4, [300] * 4, [300, 300, 5000], [1] * 5]


@pytest.mark.parametrize(
    ("limit", "count"), [(0, 0), (19, 1), (20, 2), (29, 2), (90, 9), (10**12, 9), (None, 9)]
)
def test_documents_stop_at_the_limit(limit, count, folder):
    write_file(folder / "a.jsonl", ["é" * 5] * 9)  # ten bytes each
    assert len(texts_of(unit(folder / "a.jsonl", limit=limit))) == count


# --- Errors -----------------------------------------------------------------------------------------------


def packed(name: str, pack: Callable[[bytes], bytes], keep: float) -> Callable[[Path], None]:
    """Writes a compressed file of which a part is missing."""

    def write(folder: Path) -> None:
        noise = random.Random(0).randbytes
        data = pack("".join(json.dumps({"body": noise(200).hex()}) + "\n" for _ in range(999)).encode())
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return write


def table(**columns) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(columns), folder / "a.parquet")


def arrow(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "a.arrow").write_bytes(data)


def jsonl(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "a.jsonl").write_text(text)


def half(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_file(folder / name, TEXTS)
        os.truncate(folder / name, (folder / name).stat().st_size // 2)

    return write


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (jsonl('{"text": "x"}\n'), r"text_column: 'body' is not a column of \S*a.jsonl; it has text$"),
        (table(b=["x"], c=["y"]), r"text_column: 'body' is not a column of \S*a.parquet; it has b, c$"),
        (table(body=[1, 2]), r"text_column: 'body' of \S*a.parquet holds int64, not text$"),
        (jsonl('{"body": ["a", "b"]}\n'), r"text_column: 'body' of \S*a.jsonl holds list<.*>, not text$"),
        (jsonl('{"body": "a"}\n{broken\n'), r"\S*a.jsonl cannot be read as json: "),
        (jsonl('{"body": "a"}\n{"body": 7}\n'), r"text_column: 'body' of \S*a.jsonl holds .*, not text$"),
        (jsonl('{"body": "a"}\n{"body": "b'), r"\S*a.jsonl cannot be read as json: "),
        (jsonl("\x00" * 99), r"\S*a.jsonl cannot be read as json: "),
        (lambda f: (f / "a.jsonl.gz").write_text("no gzip"), r"\S*a.jsonl.gz cannot be read as json: "),
        (packed("a.jsonl.gz", gzip.compress, 0.9), r"\S*a.jsonl.gz cannot be read as json: "),
        (packed("a.jsonl.zst", zstandard.compress, 0.9), r"\S*a.jsonl.zst cannot be read as json: "),
        (lambda f: (f / "a.parquet").write_text("zz"), r"\S*a.parquet cannot be read as parquet: "),
        (half("a.parquet"), r"\S*a.parquet cannot be read as parquet: "),
        (half("a.arrow"), r"\S*a.arrow cannot be read as arrow: "),
        (arrow(b"x" * 99), r"\S*a.arrow cannot be read as arrow: "),
    ],
)
def test_wrong_input_is_one_line(prepare, says, folder, tmp_path, capfd):
    prepare(folder)
    (found,) = units_of(folder, tmp_path)
    with pytest.raises(ConfigError, match=f"^{says}") as caught:
        texts_of(found)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_went_away_is_named(kind, folder, tmp_path):
    write_file(folder / f"a.{kind}", TEXTS)
    (found,) = units_of(folder, tmp_path)
    (folder / f"a.{kind}").unlink()
    with pytest.raises(ConfigError, match=rf"^\S*a.{kind} cannot be read") as caught:
        texts_of(found)
    assert "\n" not in str(caught.value)


# --- Servers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_gives_what_the_files_hold_whatever_fails(kind, folder, tmp_path, server):
    write_file(folder / f"a.{kind}", TEXTS)
    (here,) = units_of(folder, tmp_path)
    (there,) = units_of(server.url(f"a.{kind}"), tmp_path)
    for fault in ("cut", "status", "stall", "drop"):
        server.fail(f"a.{kind}", fault)
    said: list[str] = []
    assert texts_of(there, minutes=0.1, say=said.append) == texts_of(here)
    assert not server.pending()
    assert all(f"/a.{kind}: " in line and "next try in" in line for line in said) and len(said) >= 2


def test_a_file_that_has_changed_since_it_was_listed_is_refused(folder, tmp_path, server):
    write_file(folder / "a.jsonl", TEXTS)
    (found,) = units_of(server.url("a.jsonl"), tmp_path)
    write_file(folder / "a.jsonl", TEXTS[::-1])
    with pytest.raises(ConfigError, match=r"^\S*a.jsonl changed since it was listed; "):
        texts_of(found)


def test_a_server_that_stays_away_is_one_line(folder, tmp_path, server):
    write_file(folder / "a.jsonl", TEXTS)
    (found,) = units_of(server.url("a.jsonl"), tmp_path)
    server.down()
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"a.jsonl could not be read for 0 s: Connection refused; "):
        texts_of(found, minutes=0.001, say=said.append)
    assert said


# --- What reading leaves alone ----------------------------------------------------------------------------


def test_nothing_is_left_behind(folder, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    write_folder(folder, "parquet", TEXTS)
    for found in units_of(folder, tmp_path):
        texts_of(found)
        next(read(found))  # and is given up
    assert list((tmp_path / "scratch").iterdir()) == []


OFFLINE = """
import socket, sys
def refuse(*a, **k):
    print("network:", a, file=sys.stderr)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from data.config import DataConfig, SourceConfig
from data.sources import find_units
from data.reading import read
for path in sys.argv[2:]:
    config = DataConfig(cache_dir=sys.argv[1])
    units = find_units("x", SourceConfig(files=[path], text_column="body"), config, print).units
    if "broken" not in path:
        assert sum(len(b) for u in units for b in read(u)) == 150, path
        continue
    try:
        list(read(units[0]))
    except ValueError as error:
        print(error)
"""


def test_local_files_touch_neither_network_nor_home(tmp_path):
    for kind in KINDS:
        write_folder(tmp_path / kind, kind, TEXTS)
    (tmp_path / "broken.jsonl").write_text('{"body": "a"}\n{broken\n')
    home = tmp_path / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | {"HOME": str(home)}
    places = [str(tmp_path / name) for name in ("cache", *KINDS, "broken.jsonl")]
    command = [sys.executable, "-c", OFFLINE, *places]
    done = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no attempt, and no line of the library's own
    assert len(done.stdout.splitlines()) == 1 and "broken.jsonl cannot be read" in done.stdout
    assert not [p for p in home.rglob("*") if p.is_file()]
