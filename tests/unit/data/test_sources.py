from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError
from data import remote, sources
from data.config import BUILTIN, DataConfig, SourceConfig
from data.reading import read
from data.sources import Listing, braces, find_units
from tests.http_server import Server, serve
from tests.unit.data.written import KINDS, ROW_GROUP, write_file, write_folder

TEXTS = [f"text {i} é中\n" * (i % 50 + 1) for i in range(150)]


class Find:
    """find(*files): the listing of the source `x`; what was said meanwhile is in find.said."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.said: list[str] = []

    def __call__(self, *files: object, column: str = "body", **config) -> Listing:
        source = SourceConfig(files=[str(file) for file in files], text_column=column)
        own: dict[str, Any] = {"cache_dir": str(self.cache), "patience_minutes": 0.02}
        return find_units("x", source, DataConfig(**(own | config)), self.said.append)


@pytest.fixture
def find(tmp_path: Path) -> Find:
    return Find(tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read to be hashed."""
    names: list[str] = []
    original = sources.checksum

    def checksum(path: str) -> str:
        names.append(os.path.basename(path))
        return original(path)

    monkeypatch.setattr(sources, "checksum", checksum)
    return names


def names_of(listing: Listing, root: Path) -> list[str]:
    return sorted(os.path.relpath(file, root) for unit in listing.units for file in unit.files)


def fingerprints(listing: Listing) -> dict[str, str]:
    """{first file of a unit: its fingerprint}"""
    return {os.path.basename(unit.files[0]): unit.fingerprint for unit in listing.units}


# --- What is found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_all_below_it(kind, find, folder):
    write_folder(folder, kind, TEXTS)
    listing = find(folder)
    everything = [path for path in folder.rglob("*") if path.is_file()]
    assert names_of(listing, folder) == sorted(os.path.relpath(path, folder) for path in everything)
    builder = {"txt": "text", "parquet": "parquet", "arrow": "arrow"}.get(kind, "json")
    column = "text" if kind == "txt" else "body"
    assert {(unit.builder, unit.column) for unit in listing.units} == {(builder, column)}
    size = sum(path.stat().st_size for path in everything)
    assert sum(unit.size for unit in listing.units) == listing.source_bytes == size


def test_files_globs_and_several_of_them(find, folder, monkeypatch):
    for name in ("a.jsonl", "sub/a.jsonl", "sub/deep/b.jsonl", "other/a.jsonl"):
        write_file(folder / name, [name])
    assert names_of(find(folder / "a.jsonl"), folder) == ["a.jsonl"]
    assert names_of(find(folder / "*.jsonl"), folder) == ["a.jsonl"]
    assert names_of(find(folder / "**" / "a.jsonl"), folder) == ["a.jsonl", "other/a.jsonl", "sub/a.jsonl"]
    assert names_of(find(folder / "[so]*" / "?.jsonl"), folder) == ["other/a.jsonl", "sub/a.jsonl"]
    both = find(folder / "other", folder / "sub", folder / "a.jsonl")  # three of them are called a.jsonl
    assert names_of(both, folder) == ["a.jsonl", "other/a.jsonl", "sub/a.jsonl", "sub/deep/b.jsonl"]
    assert len(set(fingerprints(both).values())) == 2 and len({u.fingerprint for u in both.units}) == 4
    monkeypatch.chdir(folder)
    assert all(os.path.isabs(unit.files[0]) for unit in find("sub", "*.jsonl").units)
    monkeypatch.setenv("HOME", str(folder))
    assert names_of(find("~/sub/deep"), folder) == ["sub/deep/b.jsonl"]


def test_file_names_are_not_patterns(find, folder):
    names = ["[a].txt", "a*.txt", "a?.txt", "ab.txt", "{1..3}.txt"]
    for name in names:
        (folder / name).write_text(name)
    assert names_of(find(folder), folder) == names
    assert names_of(find(folder / "a*.txt"), folder) == ["a*.txt"]  # it is there: no glob
    assert [t for u in find(folder / "[a].txt").units for b in read(u) for t in b] == ["[a].txt"]


def test_hidden_files_and_unknown_endings_are_left_out_and_counted(find, folder):
    names = [".git/x.txt", ".hidden.txt", "seen.TXT", "picture.png", "site-packages/p.txt", "archive.txt.gz"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "empty.txt").touch()
    (folder / "dangling.txt").symlink_to("nowhere")
    listing = find(folder)
    assert names_of(listing, folder) == ["seen.TXT"]
    assert (listing.source_bytes, listing.ignored_files) == (len("seen.TXT"), 2)


def test_built_in_source_is_python_without_packages(find, monkeypatch):
    listing = find(BUILTIN, max_bytes=400_000)
    files = [f for unit in listing.units for f in unit.files]
    assert listing.ignored_files == 0
    assert listing.source_bytes > 10_000_000
    assert len(files) > 3
    assert all(f.endswith(".py") for f in files)
    assert find(BUILTIN, max_bytes=400_000) == listing
    names = sources.python_files()
    assert 50_000 < max(map(os.path.getsize, names.values())) <= 200_000
    assert {name.split("/")[0] for name in names} == {"python", "torch"}
    assert not any("site-packages" in name for name in names)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("http://h/a", ["http://h/a"]),
        ("http://h/{0..2}", ["http://h/0", "http://h/1", "http://h/2"]),
        ("http://h/{08..10}.x", ["http://h/08.x", "http://h/09.x", "http://h/10.x"]),
        ("http://h/{1..2}/{3..4}", ["http://h/1/3", "http://h/1/4", "http://h/2/3", "http://h/2/4"]),
        ("http://h/{2..1}", []),
        ("http://h/{a..b}", ["http://h/{a..b}"]),
    ],
)
def test_ranges_in_addresses(pattern, found):
    assert braces(pattern) == found


def test_small_files_share_units(find, folder, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    for i in range(43):
        (folder / f"{i:02d}.txt").write_text("x" * 100)
    units = find(folder).units
    assert sorted(len(unit.files) for unit in units) == [3, 10, 10, 10, 10]
    files = [file for unit in units for file in unit.files]
    assert len(files) == len(set(files)) == 43


def many_row_groups(path: Path) -> None:
    texts = [f"{i} " + "ab" * (i % 90) for i in range(10 * ROW_GROUP)]
    write_file(path, texts)


def test_a_large_parquet_file_is_ranges_of_row_groups(find, folder, monkeypatch):
    many_row_groups(folder / "a.parquet")
    assert [unit.row_groups for unit in find(folder).units] == [None]
    metadata = pq.read_metadata(folder / "a.parquet")
    one = metadata.row_group(3).column(1).total_uncompressed_size
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 2 * one)
    units = find(folder).units
    ranges = sorted(unit.row_groups for unit in units)
    assert 2 < len(units) < 10 and len({unit.fingerprint for unit in units}) == len(units)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(10))
    size = (folder / "a.parquet").stat().st_size
    assert size - len(units) <= sum(unit.size for unit in units) <= size
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 4 * size)  # large enough to look, too small to cut
    assert [unit.row_groups for unit in find(folder).units] == [None]


# --- Order and identity -----------------------------------------------------------------------------------


def test_units_are_in_the_order_of_their_hashes_wherever_they_lie(find, folder, tmp_path):
    for i in range(12):
        write_file(folder / f"{i:02d}.jsonl", [f"text {i}"])
    units = find(folder).units
    assert [unit.fingerprint for unit in units] == sorted(unit.fingerprint for unit in units)
    order = [os.path.basename(unit.files[0]) for unit in units]
    assert order != sorted(order)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprints(find(tmp_path / "elsewhere")) == fingerprints(find(folder))


def test_fingerprint_follows_content_name_and_what_is_taken_not_time(find, folder, monkeypatch):
    path = folder / "a.parquet"
    many_row_groups(path)

    def fingerprint(**options) -> str:
        return find(folder, **options).units[0].fingerprint

    before = fingerprint()
    os.utime(path, (1, 1))
    assert fingerprint() == before
    others = [fingerprint(column="n"), fingerprint(max_bytes=1000), fingerprint(max_bytes=2000)]
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 2000)
    others += [unit.fingerprint for unit in find(folder).units]
    assert len({before, *others}) == 1 + len(others)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_other_files_are_other_units(kind, find, folder, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1)  # each text is a unit
    for name in "abc":
        write_file(folder / f"{name}.{kind}", [f"text {name}"])
    first = fingerprints(find(folder))
    write_file(folder / f"b.{kind}", ["text B"])  # as long as before
    changed = fingerprints(find(folder))
    assert {name for name in first if first[name] != changed[name]} == {f"b.{kind}"}
    write_file(folder / f"aa.{kind}", ["new"])
    added = fingerprints(find(folder))
    assert added == {**changed, f"aa.{kind}": added[f"aa.{kind}"]}
    (folder / f"a.{kind}").unlink()
    del added[f"a.{kind}"]
    assert fingerprints(find(folder)) == added
    (folder / f"c.{kind}").rename(folder / f"d.{kind}")
    renamed = fingerprints(find(folder))
    assert set(renamed) == {f"aa.{kind}", f"b.{kind}", f"d.{kind}"}
    assert renamed[f"d.{kind}"] != added[f"c.{kind}"]


# --- max_bytes --------------------------------------------------------------------------------------------


def documents(listing: Listing) -> list[str]:
    return [text for unit in listing.units for batch in read(unit) for text in batch]


@pytest.mark.parametrize("kind", KINDS)
def test_max_bytes_holds_and_takes_the_same_documents(kind, find, folder):
    write_folder(folder, kind, TEXTS)
    assert sum(len(t.encode()) for t in TEXTS) > 50_000
    small, large, all_ = (documents(find(folder, max_bytes=n)) for n in (10_000, 40_000, 10**9))
    assert 0.4 * 10_000 < sum(len(t.encode()) for t in small) <= 10_000
    assert sum(len(t.encode()) for t in large) <= 40_000
    assert set(small) < set(large) < set(TEXTS)
    assert sorted(all_) == sorted(TEXTS)
    assert documents(find(folder, max_bytes=10_000)) == small


def test_max_bytes_of_text_files_is_a_fair_sample(find, folder):
    for i in range(100):
        (folder / f"{i:02d}.txt").write_text("x" * 10)
    taken = [set(names_of(find(folder, max_bytes=n), folder)) for n in (1, 200, 500)]
    assert [len(names) for names in taken] == [1, 20, 50]
    assert taken[0] < taken[1] < taken[2]
    assert 10 < len([name for name in taken[2] if name < "50"]) < 40


def test_max_bytes_takes_whole_files_of_many(find, folder):
    for i in range(10):
        write_file(folder / f"{i}.jsonl", ["x" * 100])
    size = (folder / "1.jsonl").stat().st_size
    for most, count in ((1, 1), (3.5 * size, 3), (10 * size - 1, 9)):
        units = find(folder, max_bytes=int(most)).units
        assert len(units) == count
        assert [unit.limit for unit in units] == [min(size, int(most))] * count
    (folder / "0.jsonl").unlink()  # the limits of the others stay
    assert {unit.limit for unit in find(folder, max_bytes=int(3.5 * size)).units} == {size}


def test_max_bytes_above_what_is_on_disk_is_shared_by_files_and_row_groups(find, folder, monkeypatch):
    """What is compressed holds more text than its bytes on disk."""
    many_row_groups(folder / "a.parquet")
    shutil.copy(folder / "a.parquet", folder / "b.parquet")
    size = (folder / "a.parquet").stat().st_size
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 3000)
    units = find(folder, max_bytes=9 * size).units  # four times as much as there is, in powers of two
    for name in "ab":
        limits = [int(unit.limit or 0) for unit in units if unit.files[0].endswith(f"{name}.parquet")]
        assert len(limits) > 2 and 4 * size - 4 * len(limits) <= sum(limits) <= 4 * size  # rounded down
    shutil.copy(folder / "a.parquet", folder / "c.parquet")
    (folder / "c.parquet").write_bytes(b"")
    assert find(folder, max_bytes=8 * size).units == units  # it would rather leave some than change all


def test_max_bytes_takes_the_first_row_groups_of_one_file(find, folder, monkeypatch):
    many_row_groups(folder / "a.parquet")
    size = (folder / "a.parquet").stat().st_size
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 3000)
    count = len(find(folder).units)
    units = sorted(find(folder, max_bytes=size // 2).units, key=lambda unit: unit.row_groups or (0, 0))
    assert count > 4 and abs(len(units) - count / 2) <= 1
    assert units[0].row_groups and units[0].row_groups[0] == 0
    assert size // 2 - count <= sum(int(unit.limit or 0) for unit in units) <= size // 2


def test_row_groups_of_very_many_files_are_not_looked_up(find, folder, monkeypatch):
    many_row_groups(folder / "a.parquet")
    shutil.copy(folder / "a.parquet", folder / "b.parquet")
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 3000)
    monkeypatch.setattr(sources, "MANY_FILES", 1)
    assert [unit.row_groups for unit in find(folder).units] == [None, None]


# --- Listings ---------------------------------------------------------------------------------------------


def test_unchanged_files_are_hashed_once(find, folder, hashed_files):
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)
    listing = find(folder)
    assert sorted(hashed_files) == ["a.txt", "b.txt", "c.txt"]
    assert find(folder) == listing and len(hashed_files) == 3
    (folder / "b.txt").write_text("changed")
    assert find(folder) != listing and hashed_files[3:] == ["b.txt"]
    os.utime(folder / "c.txt", (1, 1))
    assert find(folder) == find(folder) and hashed_files[4:] == ["c.txt"]
    assert find.said == []


def test_a_source_that_is_gone_is_its_listing_with_a_warning(find, folder, tmp_path):
    write_folder(folder, "jsonl", TEXTS)
    listing = find(folder)
    folder.rename(tmp_path / "away")
    assert find(folder) == listing
    assert find.said == [
        f"data.sources.x: {folder} does not exist; going on with the shards that were made of it"
    ]
    for other in ({"column": "n"}, {"max_bytes": 9}):  # never listed
        with pytest.raises(ConfigError, match=r"^data.sources.x: .*in does not exist$"):
            find(folder, **other)
    (tmp_path / "away").rename(folder)
    write_file(folder / "new.jsonl", ["new"])
    assert len(find(folder).units) == len(listing.units) + 1 and len(find.said) == 1


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"units": [{}], "files": []}', "\x00"])
def test_a_listing_that_cannot_be_read_is_made_anew(content, find, folder):
    write_folder(folder, "jsonl", TEXTS)
    listing = find(folder)
    (path,) = (find.cache / "listings").iterdir()
    good = path.read_bytes()
    path.write_text(content)
    assert find(folder) == listing
    assert path.read_bytes() == good


def test_listings_of_other_choices_are_kept_apart(find, folder):
    write_folder(folder, "parquet", TEXTS)
    whole = find(folder)
    others = [find(folder, max_bytes=900), find(folder, column="n"), find(folder / "a.parquet")]
    assert len({tuple(listing.units) for listing in (whole, *others)}) == 4
    assert find(folder) == whole
    assert len(list((find.cache / "listings").iterdir())) == 4


# --- Servers ----------------------------------------------------------------------------------------------


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.5)
    with serve(folder) as server:
        yield server


def test_addresses_are_looked_at_once(find, folder, server, monkeypatch):
    for i in range(3):
        write_file(folder / f"p{i}.jsonl", [f"text {i}"])
    pattern = server.url("p{0..2}.jsonl")
    listing = find(pattern)
    assert sorted(unit.files[0] for unit in listing.units) == [server.url(f"p{i}.jsonl") for i in range(3)]
    assert all(unit.remote and unit.builder == "json" and unit.known[0][1] for unit in listing.units)
    assert [unit.known[0][0] for unit in listing.units] == [unit.size for unit in listing.units]
    asked = len(server.requests)
    write_file(folder / "p1.jsonl", ["another text"])
    assert find(pattern) == listing and len(server.requests) == asked
    for path in (find.cache / "listings").iterdir():
        path.unlink()
    again = find(pattern)
    assert len(server.requests) > asked
    assert len({u.fingerprint for u in again.units} & {u.fingerprint for u in listing.units}) == 2


def test_row_groups_of_a_parquet_file_on_a_server(find, folder, server, monkeypatch):
    many_row_groups(folder / "a.parquet")
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 2000)
    remote_units = find(server.url("a.parquet")).units
    local = [(unit.row_groups, unit.size) for unit in find(folder).units]
    assert sorted((unit.row_groups, unit.size) for unit in remote_units) == sorted(local)
    assert len(local) > 2 and find.said == []


def test_an_address_may_have_a_query_that_is_not_shown(find, folder, server):
    write_file(folder / "a.jsonl", ["x"])
    server.fail("a.jsonl", "status", times=1)
    urls = [server.url("a.jsonl?part=1&token=secret"), server.url("a.jsonl?part=2&token=secret")]
    assert sorted(unit.files[0] for unit in find(*urls).units) == urls
    assert len(find.said) == 1 and "503" in find.said[0]
    with pytest.raises(ConfigError) as caught:
        find(server.url("missing.jsonl?token=secret"))
    assert "secret" not in f"{find.said} {caught.value}"


def test_files_here_and_on_a_server_in_one_source(find, folder, server):
    write_file(folder / "a.jsonl", ["x"])
    write_file(folder / "b.jsonl", ["y"])
    listing = find(folder / "a.jsonl", server.url("b.jsonl"))
    assert sorted(documents(listing)) == ["x", "y"]
    assert find(folder / "a.jsonl", server.url("b.jsonl")) == listing


# --- Errors -----------------------------------------------------------------------------------------------


def mixed(folder: Path) -> None:
    (folder / "a.txt").write_text("x")
    (folder / "a.jsonl").write_text('{"text": "x"}\n')


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda f: f.rmdir(), "data.sources.x: .* does not exist"),
        (lambda f: None, "data.sources.x: no file to read .* known endings are .txt "),
        (lambda f: (f / "a.png").write_text("x"), "data.sources.x: no file to read"),
        (lambda f: (f / "a.txt").touch(), "data.sources.x: every file is empty"),
        (mixed, r"data.sources.x: .* mixes json \(a.jsonl\) and text \(a.txt\) files"),
    ],
)
def test_a_wrong_folder_is_one_line(prepare: Callable, says: str, find, folder):
    prepare(folder)
    with pytest.raises(ConfigError, match=f"^{says}") as caught:
        find(folder)
    assert "\n" not in str(caught.value)
    assert not (find.cache / "listings").exists()


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("nowhere/*.txt", "data.sources.x: nowhere/.* does not exist"),
        ("s3://bucket/a.txt", "data.sources.x: s3://bucket/a.txt is neither a file nor an http"),
        ("http://127.0.0.1:9/{5..2}.txt", "data.sources.x: no file to read in http"),
        ("http://127.0.0.1:9/a.png", "data.sources.x: no file to read in http"),
        (
            "http://127.0.0.1:9/a.txt",
            "http://127.0.0.1:9/a.txt could not be read for 0 s: Connection refused",
        ),
    ],
)
def test_a_wrong_name_is_one_line(pattern, says, find, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{says}") as caught:
        find(pattern, patience_minutes=0.0)
    assert "\n" not in str(caught.value)


def test_one_source_of_ones_own_is_called_data_path(tmp_path):
    config = DataConfig(path=str(tmp_path / "no"), cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^data.path: .*no does not exist"):
        find_units("text", config.chosen()["text"], config, print)


def test_an_unreadable_folder_is_named(find, folder, monkeypatch):
    write_file(folder / "closed" / "a.txt", ["x"])
    write_file(folder / "a.txt", ["x"])
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
    with pytest.raises(ConfigError, match=r"^\S*in/closed cannot be listed: Permission denied; "):
        find(folder)


def test_an_unreadable_file_is_named(find, folder, monkeypatch):
    write_file(folder / "a.txt", ["x"])

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("data.files.open", refuse, raising=False)
    with pytest.raises(ConfigError, match=r"^\S*a.txt cannot be read: Permission denied; "):
        find(folder)


@pytest.mark.parametrize("where", ["here", "server"])
def test_a_broken_parquet_file_is_named_before_it_is_read(where, find, folder, server, monkeypatch):
    (folder / "a.parquet").write_text("no parquet" * 10)
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 10)
    with pytest.raises(ConfigError, match=r"^\S*a.parquet cannot be read") as caught:
        find(folder if where == "here" else server.url("a.parquet"))
    assert "\n" not in str(caught.value)


def test_a_listing_says_what_it_was_made_of(find, folder):
    write_file(folder / "a.jsonl", ["x"])
    find(folder)
    (path,) = (find.cache / "listings").iterdir()
    kept = json.loads(path.read_text())
    assert [Path(file["path"]) for file in kept["files"]] == [folder / "a.jsonl"]
    assert not list(find.cache.rglob("*.tmp"))


def test_a_column_that_is_missing_is_no_reason_to_fail_before_reading(find, folder, monkeypatch):
    pq.write_table(pa.table({"other": ["x" * 100] * 9}), folder / "a.parquet", row_group_size=3)
    monkeypatch.setattr(sources, "ROW_GROUPS_BYTES", 10)
    unit = find(folder).units[0]
    with pytest.raises(ConfigError, match=r"^text_column: 'body' is not a column of \S*; it has other$"):
        list(read(unit))
