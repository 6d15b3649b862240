"""Reading over http: whatever the server does, all documents of a file or one clear error, never fewer."""

from __future__ import annotations

import gzip
import json
import random
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from data import remote
from tests.http_server import Server, serve

BLOCK = 8192  # bytes: some requests for each of the small files below
BUILDERS: dict[str, tuple[str, dict]] = {
    "a.jsonl": ("json", {"chunksize": 2 * BLOCK}),
    "a.jsonl.gz": ("json", {"chunksize": 2 * BLOCK}),
    "a.jsonl.zst": ("json", {"chunksize": 2 * BLOCK}),
    "a.txt": ("text", {"encoding_errors": "replace", "chunksize": 2 * BLOCK}),
    "a.parquet": ("parquet", {"columns": ["text"]}),
    "stream.arrow": ("arrow", {}),
    "file.arrow": ("arrow", {}),
}
FAULTS: dict[str, dict] = {
    "cut": {"times": 2},
    "cut at once": {"part": 0.0},
    "drop": {},
    "status 503": {"code": 503, "times": 2},
    "stall": {},
    "hang": {},
    "short": {"times": 2},
    "astray": {},
    "down": {"seconds": 0.05},
}


def some_documents(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"{i} é {draw.randbytes(100).hex()}" for i in range(300)]


OLD, NEW = some_documents(0), some_documents(1)


def encoded(name: str, documents: list[str]) -> bytes:
    """The documents as a file of this name."""
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    table = pa.table({"id": range(len(documents)), "text": documents})
    sink = pa.BufferOutputStream()
    if name == "a.parquet":
        pq.write_table(table, sink, row_group_size=50)
    elif name == "stream.arrow":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    elif name == "file.arrow":
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    else:
        return {
            "a.jsonl": lines,
            "a.jsonl.gz": gzip.compress(lines, mtime=0),
            "a.jsonl.zst": zstandard.compress(lines),
            "a.txt": "".join(document + "\n" for document in documents).encode(),
        }[name]
    return sink.getvalue().to_pybytes()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that waits, waits less."""
    for name, seconds in {
        "CONNECT_SECONDS": 2.0,
        "READ_SECONDS": 5.0,
        "FIRST_WAIT": 0.01,
        "LONGEST_WAIT": 0.03,
    }.items():
        monkeypatch.setattr(remote, name, seconds)
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of all formats of OLD."""
    (tmp_path / "served").mkdir()
    for name in BUILDERS:
        (tmp_path / "served" / name).write_bytes(encoded(name, OLD))
    with serve(tmp_path / "served") as server:
        yield server


class Read:
    """read(name): the documents of a file; what was said meanwhile is in read.said."""

    def __init__(self, server: Server, scratch: Path) -> None:
        self.server, self.scratch = server, scratch
        self.said: list[str] = []

    def __call__(self, name: str, minutes: float = 0.2, **options) -> list[str]:
        url = self.server.url(name)
        options = remote.streamed([url], minutes=minutes, say=self.said.append, **options)
        return list(self.stream(name, **options))

    def stream(self, name: str, **options) -> Iterator[str]:
        builder, details = BUILDERS[name]
        rows = datasets.load_dataset(
            builder, split="train", streaming=True, cache_dir=str(self.scratch), **details, **options
        )
        for table in rows.with_format("arrow").iter(64):
            yield from table["text"].to_pylist()


@pytest.fixture
def read(server: Server, tmp_path: Path) -> Read:
    return Read(server, tmp_path / "scratch")


def positions(server: Server, read: Read, name: str) -> list[int]:
    """First, middle and last of the GET requests that reading a file takes."""
    assert read(name) == OLD
    count = sum(request.method == "GET" for request in server.requests)
    return sorted({0, count // 2, count - 1})


# --- Files under faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_every_document_arrives_whatever_fails(
    server: Server, read: Read, name: str, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ranges = ranges
    for skip in positions(server, read, name):
        for fault, details in FAULTS.items():
            monkeypatch.setattr(remote, "READ_SECONDS", 0.1 if fault in ("stall", "hang") else 5.0)
            server.fail(name, fault.split()[0], skip=skip, methods=("GET",), **details)
            assert read(name) == OLD, f"{fault} at request {skip}"
            assert not server.pending(), f"{fault} at request {skip} was never met"
    assert read.said


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_changing_file_is_never_a_mixture(server: Server, read: Read, name: str, ranges: bool) -> None:
    server.ranges = ranges
    errors = 0
    for skip in positions(server, read, name):
        for documents in (NEW, [*NEW, "one more"], NEW[:-1]):
            (server.folder / name).write_bytes(encoded(name, OLD))
            server.fail(name, "changed", skip=skip, content=encoded(name, documents))
            try:
                assert read(name) == (documents if skip == 0 else OLD)
            except ConfigError as error:
                assert f"{server.url(name)} changed" in str(error)
                errors += 1
            assert not server.pending()
    assert errors >= 3


def test_a_file_of_another_size_is_noticed_without_a_version(server: Server, read: Read) -> None:
    server.versions = False
    server.fail("a.jsonl.gz", "changed", skip=2, content=encoded("a.jsonl.gz", NEW[:-1]))
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz changed"):
        read("a.jsonl.gz")


def test_a_file_must_still_be_the_one_that_was_described(server: Server, read: Read) -> None:
    url = server.url("a.jsonl")
    known = {url: remote.describe(url)}
    assert read("a.jsonl", known=known) == OLD
    (server.folder / "a.jsonl").write_bytes(encoded("a.jsonl", NEW))
    with pytest.raises(ConfigError, match=r"a\.jsonl changed"):
        read("a.jsonl", known=known)


def test_sizes_that_only_ranges_tell_are_enough(server: Server, read: Read) -> None:
    server.sizes = False
    server.fail("a.parquet", "cut", skip=2, times=2)
    assert read("a.parquet") == OLD
    assert not server.pending()


def test_a_server_that_tells_no_size_is_refused(server: Server, read: Read) -> None:
    server.sizes = server.ranges = False
    with pytest.raises(ConfigError, match="does not tell the size"):
        read("a.jsonl")


def test_a_body_that_is_short_each_time_is_an_error(server: Server, read: Read) -> None:
    server.ranges = False
    server.fail("a.jsonl", "short", times=1000)
    with pytest.raises(ConfigError, match="two sizes"):
        read("a.jsonl", minutes=0.2 / 60)


def test_compression_on_the_way_is_refused_except_of_a_gz_file(server: Server, read: Read) -> None:
    server.headers["Content-Encoding"] = "gzip"
    assert read("a.jsonl.gz") == OLD
    with pytest.raises(ConfigError, match=r"a\.jsonl: .*compresses"):
        read("a.jsonl")


def test_bytes_that_are_not_utf8_are_replaced_in_texts(server: Server, read: Read) -> None:
    (server.folder / "a.txt").write_bytes(b"caf\xe9\nplain\n")
    assert read("a.txt") == ["caf�", "plain"]


def test_an_address_with_magic_characters_is_one_file(server: Server, tmp_path: Path) -> None:
    name = "a[1]*.jsonl"
    (server.folder / name).write_bytes(encoded("a.jsonl", OLD))
    options = remote.streamed([server.url(name) + "?download=true"], minutes=0.1, say=print)
    stream = datasets.load_dataset("json", split="train", streaming=True, cache_dir=str(tmp_path), **options)
    assert [row["text"] for row in stream] == OLD


def test_several_files_are_read_in_their_order(server: Server, tmp_path: Path) -> None:
    (server.folder / "b.jsonl").write_bytes(encoded("a.jsonl", NEW))
    server.fail("b.jsonl", "cut", skip=1)
    urls = [server.url("b.jsonl"), server.url("a.jsonl")]
    options = remote.streamed(urls, minutes=0.1, say=print)
    stream = datasets.load_dataset("json", split="train", streaming=True, cache_dir=str(tmp_path), **options)
    assert [row["text"] for row in stream] == NEW + OLD


def test_one_file_can_be_opened_and_read_out_of_order(server: Server) -> None:
    server.fail("a.parquet", "cut", skip=1)
    server.fail("a.parquet", "short", skip=3)
    with remote.opened(server.url("a.parquet"), minutes=0.1, say=print) as file:
        table = pq.ParquetFile(file).read_row_groups([4, 1], columns=["text"])
    assert table["text"].to_pylist() == OLD[200:250] + OLD[50:100]


@settings(max_examples=30, deadline=None)
@given(
    reads=st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 20_000)), max_size=6),
    faults=st.lists(
        st.tuples(st.sampled_from(["cut", "short", "drop", "status"]), st.integers(0, 5), st.floats(0, 0.99)),
        max_size=4,
    ),
    ranges=st.booleans(),
)
def test_every_read_returns_exactly_its_bytes(tmp_path_factory, reads, faults, ranges) -> None:
    folder = tmp_path_factory.mktemp("served")
    content = random.Random(0).randbytes(30_000)
    (folder / "a").write_bytes(content)
    with serve(folder) as server:
        server.ranges = ranges
        for kind, skip, part in faults:
            server.fail("a", kind, skip=skip, part=part, methods=("GET",))
        with remote.opened(server.url("a"), minutes=0.2, say=lambda line: None) as file:
            for start, size in reads:
                file.seek(start)
                assert file.read(size) == content[start : start + size]


# --- Waiting --------------------------------------------------------------------------------------------


def test_a_server_that_is_down_is_waited_for(server: Server, read: Read) -> None:
    server.down(seconds=0.4)
    assert read("a.jsonl") == OLD
    assert f"{server.url('a.jsonl')}: Connection refused; next try in 0 s, failing for 0 s" in read.said


def test_a_file_that_is_not_there_is_not_waited_for(server: Server, read: Read) -> None:
    server.fail("a.jsonl", "status", code=404, times=1000)
    with pytest.raises(ConfigError, match=r"a\.jsonl cannot be read: HTTP 404 Not Found; check the address"):
        read("a.jsonl", minutes=30)
    assert len(server.requests) == 1
    assert not read.said


@pytest.mark.parametrize("code", [401, 403, 410])
def test_a_forbidden_file_is_not_waited_for(server: Server, code: int) -> None:
    server.fail("a.jsonl", "status", code=code, times=1000)
    with pytest.raises(ConfigError, match=f"HTTP {code}"):
        remote.patiently(
            lambda: remote.describe(server.url("a.jsonl")), what="a.jsonl", minutes=30, say=pytest.fail
        )


def test_patience_ends(server: Server, read: Read) -> None:
    server.fail("a.jsonl", "status", code=503, times=10_000)
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read("a.jsonl", minutes=0.3 / 60)
    assert 0.3 <= time.monotonic() - start < 3
    assert "HTTP 503 Service Unavailable" in str(caught.value)
    assert "data.patience_minutes" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(read.said) >= 3


def test_an_address_is_shown_without_its_secrets(server: Server, read: Read, tmp_path: Path) -> None:
    said: list[str] = []
    url = f"http://me:secret@127.0.0.1:{server.port}/a.jsonl?signature=secret"
    server.fail("a.jsonl", "drop", times=1)
    server.fail("a.jsonl", "status", code=403, times=1000)
    with pytest.raises(ConfigError) as caught:
        remote.opened(url, minutes=1, say=said.append)
    assert len(said) == 1
    assert "secret" not in said[0] + str(caught.value)
    assert server.url("a.jsonl") in str(caught.value)


class Clock:
    """Time that passes only by sleeping, and when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(remote, "FIRST_WAIT", 1.0)
        monkeypatch.setattr(remote, "LONGEST_WAIT", 30.0)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


def test_waits_double_up_to_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    said: list[str] = []

    def task():
        raise ConnectionResetError("reset")

    with pytest.raises(ConfigError, match="it could not be read for 2 min: reset"):
        remote.patiently(task, what="it", minutes=2, say=said.append)
    assert clock.slept == [1, 2, 4, 8, 16, 30, 30, 29]
    assert said[3] == "it: reset; next try in 8 s, failing for 7 s"
    assert len(said) == len(clock.slept)


def test_errors_of_the_program_are_raised_as_they_are() -> None:
    def task():
        raise KeyError("a")

    with pytest.raises(KeyError):
        remote.patiently(task, what="it", minutes=1, say=pytest.fail)


# --- Which failures are transient -----------------------------------------------------------------------


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def with_status(code: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = code
    return requests.HTTPError(response=response)


TRANSIENT = [
    TimeoutError(),
    ConnectionRefusedError(),
    ConnectionError("Server Disconnected"),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    OSError(113, "No route to host"),
    requests.Timeout(),
    requests.exceptions.ChunkedEncodingError(),
    *(with_status(code) for code in (408, 429, 500, 503, 504)),
    caused(FileNotFoundError("https://nowhere.invalid/a"), with_status(503)),
    caused(RuntimeError("generator"), TimeoutError()),
]
PERMANENT = [
    *(with_status(code) for code in (400, 401, 403, 404, 410)),
    FileNotFoundError("a.txt"),
    PermissionError(13, "Permission denied"),
    KeyError("a"),
    ConfigError("data.path: wrong"),
    EOFError("Compressed file ended before the end-of-stream marker was reached"),
    requests.exceptions.MissingSchema("no scheme"),
    caused(requests.ConnectionError(), ssl.SSLCertVerificationError("self-signed certificate")),
    caused(FileNotFoundError("https://nowhere.invalid/a"), with_status(404)),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_trying_again_may_help(error: BaseException) -> None:
    assert remote.is_transient(error)


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_trying_again_does_not_help(error: BaseException) -> None:
    assert not remote.is_transient(error)


def test_a_reason_that_nothing_tells_is_asked_for(server: Server) -> None:
    url = server.url("a.jsonl")
    assert not remote.is_transient(FileNotFoundError(server.url("missing")))
    assert remote.is_transient(FileNotFoundError(f"Unable to find '{url}'"))
    server.fail("a.jsonl", "status", code=503)
    assert remote.is_transient(FileNotFoundError(url))
    server.down()
    assert remote.is_transient(FileNotFoundError(url))


@pytest.mark.parametrize("code, transient", [(503, True), (429, True), (404, False), (403, False)])
def test_errors_of_other_libraries_are_understood(server: Server, code: int, transient: bool) -> None:
    fsspec_http = pytest.importorskip("fsspec.implementations.http")
    httpx = pytest.importorskip("huggingface_hub.utils").httpx
    server.fail("a.jsonl", "status", code=code, times=100)
    for open_ in (
        lambda url: fsspec_http.HTTPFileSystem(skip_instance_cache=True).open(url),
        lambda url: httpx.get(url).raise_for_status(),
    ):
        with pytest.raises(Exception) as caught:
            open_(server.url("a.jsonl"))
        assert remote.is_transient(caught.value) == transient
        assert f"HTTP {code}" in remote.reason(caught.value)
    server.down()
    with pytest.raises(httpx.HTTPError) as refused:
        httpx.get(server.url("a.jsonl"))
    assert remote.is_transient(refused.value)


# --- Looking at a file ----------------------------------------------------------------------------------


def test_size_and_version_of_a_file(server: Server) -> None:
    size = (server.folder / "a.txt").stat().st_size
    first = remote.describe(server.url("a.txt"))
    server.ranges = False
    assert remote.describe(server.url("a.txt")) == first
    assert first.size == size and first.version
    server.versions = False
    assert remote.describe(server.url("a.txt")) == remote.RemoteFile(size, "")
    server.headers["Last-Modified"] = "Mon, 01 Jan 2024 00:00:00 GMT"
    assert remote.describe(server.url("a.txt")).version == "Mon, 01 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file_has_size_0(server: Server, ranges: bool) -> None:
    server.ranges = ranges
    (server.folder / "a").write_bytes(b"")
    assert remote.describe(server.url("a")).size == 0
    with remote.opened(server.url("a"), minutes=0.1, say=pytest.fail) as file:
        assert file.read() == b""


def test_a_file_that_may_not_be_asked_with_head_is_read(server: Server, read: Read) -> None:
    server.fail("a.jsonl", "status", code=403, methods=("HEAD",), times=1000)
    for server.ranges in (True, False):
        assert read("a.jsonl") == OLD


# --- Streams --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(items=st.lists(st.integers() | st.none(), max_size=20), failures=st.lists(st.integers(0, 20)))
def test_a_resumed_stream_gives_every_item_once(items: list, failures: list[int]) -> None:
    left = list(failures)  # where each opening of the stream fails, if it gets there

    def opened() -> Iterator:
        stop = left.pop(0) if left else None
        for index, item in enumerate(items):
            if index == stop:
                raise ConnectionResetError
            yield item
        if stop is not None and stop >= len(items):
            raise TimeoutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "FIRST_WAIT", 0)
        assert list(remote.resumed(opened, what="it", minutes=1, say=lambda line: None)) == items


def test_a_stream_may_fail_when_it_is_opened() -> None:
    tries = iter([ConnectionResetError(), None, ConnectionResetError()])

    def opened() -> Iterator[int]:
        if error := next(tries, None):
            raise error
        return iter([1, 2])

    assert list(remote.resumed(opened, what="it", minutes=1, say=lambda line: None)) == [1, 2]


def test_patience_with_a_stream_counts_from_the_last_item(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, opened = Clock(monkeypatch), 0

    def stream() -> Iterator[int]:
        nonlocal opened
        opened += 1
        yield from range(opened)
        clock.now += 50
        raise TimeoutError

    given_ = []
    for item in remote.resumed(stream, what="it", minutes=1, say=lambda line: None):
        given_.append(item)
        clock.now += 1000  # what is done with an item does not count
        if item == 5:
            break
    assert given_ == list(range(6))
    assert set(clock.slept) == {1}

    def stuck() -> Iterator[int]:
        yield 1
        raise TimeoutError

    with pytest.raises(ConfigError, match=r"it could not be read for 60 s: no answer in time"):
        list(remote.resumed(stuck, what="it", minutes=1, say=lambda line: None))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "stream.arrow"])
def test_any_stream_of_datasets_can_be_resumed(server: Server, read: Read, name: str) -> None:
    """Also one that is not read through our file system."""
    aiohttp = pytest.importorskip("aiohttp")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=5)
    options = {"storage_options": {"client_kwargs": {"timeout": timeout}, "block_size": BLOCK}}
    options["data_files"] = [server.url(name)]  # type: ignore[assignment]
    for fault, skip in (("cut", 3), ("status", 4), ("drop", 6)):
        server.fail(name, fault, skip=skip, times=2)
    with remote.single_tries():
        documents = remote.resumed(
            lambda: read.stream(name, **options), what=name, minutes=0.2, say=read.said.append
        )
        assert list(documents) == OLD
    assert read.said


def test_a_stream_that_became_shorter_is_an_error() -> None:
    lengths = [3, 2]

    def opened() -> Iterator[int]:
        yield from range(lengths.pop(0))
        if lengths:
            raise TimeoutError

    with pytest.raises(ConfigError, match="it became shorter"):
        list(remote.resumed(opened, what="it", minutes=1, say=lambda line: None))
