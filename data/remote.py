"""Documents over http, so that a bad network costs time and never a document.

`datasets` on its own mixes two versions of a file without a word, loses bytes when it repeats a failed read
of a compressed file, gives up where waiting would do, and cannot open texts at all. So it reads through a
file system of our own: every read returns exactly the bytes asked for, of one version of the file, tried
again where that may help, or raises a ConfigError.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

import datasets
import fsspec
import requests
import urllib3
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from configs.errors import ConfigError

CONNECT_SECONDS = 10.0  # to reach a server
READ_SECONDS = 30.0  # of silence in the middle of an answer
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between two tries; doubled from one to the next
BLOCK_BYTES = 4 << 20  # asked for at a time, ahead of what is read
PREFIX = "whole+"  # of the protocols of our file system: whole+http and whole+https

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """What a server tells about a file: bytes, and its ETag or else Last-Modified (empty: neither)."""

    size: int
    version: str


class IncompleteError(OSError):
    """A server answered with less than, or something else than, what it was asked for."""


def is_url(name: str) -> bool:
    """Whether a file of the configuration is an http address."""
    return name.startswith(("http://", "https://"))


def shown(url: str) -> str:
    """The address for people: without its query and its password, which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# --- Failures -------------------------------------------------------------------------------------------

TRANSIENT_STATUS = (408, 425, 429)  # and 500 or more
TRANSIENT_ERRNO = (errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH)
# By name: some of these libraries are heavy, and none has raised before it was imported.
TRANSIENT_NAMES = re.compile(
    r"requests\.exceptions\.(ConnectionError|Timeout|ChunkedEncodingError)"
    r"|urllib3\.exceptions\.(ProtocolError|TimeoutError|NewConnectionError)"
    r"|aiohttp\.client_exceptions\.(ClientConnectionError|ClientPayloadError)"
    r"|httpx2?\.(\w+\.)*(NetworkError|TimeoutException|RemoteProtocolError|ProxyError)"
    r"|http\.client\.(IncompleteRead|BadStatusLine)"
    r"|asyncio\.exceptions\.IncompleteReadError"
)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the nearest link of the chain of causes that tells decides.

    Some libraries turn any failure to look at a file into FileNotFoundError; where nothing in the chain tells
    why, the address in its message is asked once."""
    links = chain(error)
    if any(isinstance(link, ssl.SSLCertVerificationError) for link in links):
        return False  # requests calls it a ConnectionError
    verdicts = [verdict for link in links if (verdict := judged(link)) is not None]
    if verdicts:
        return verdicts[0]
    for link in links:
        address = re.search(r"https?://[^\s'\"]+", str(link)) if isinstance(link, FileNotFoundError) else None
        if address:
            try:
                describe(address[0])
            except (OSError, ConfigError) as answer:
                return is_transient(answer)
            return True  # there it is, after all
    return False


def chain(error: BaseException) -> list[BaseException]:
    """An error and what led to it, nearest first."""
    links: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        link = left.pop(0)
        if link is not None and link not in links:
            links.append(link)
            left += [link.__cause__, link.__context__]
    return links


def judged(error: BaseException) -> bool | None:
    """Whether this error, without its chain, is transient; None if it does not tell."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in TRANSIENT_STATUS
    if isinstance(error, ConfigError):
        return False
    if isinstance(error, IncompleteError | TimeoutError | ConnectionError | socket.gaierror | ssl.SSLError):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO:
        return True
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
    return True if any(TRANSIENT_NAMES.fullmatch(name) for name in names) else None


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of requests, httpx, aiohttp or urllib."""
    response = getattr(error, "response", None)
    for holder, name in ((response, "status_code"), (error, "status")):
        status = getattr(holder, name, None)
        if isinstance(status, int) and status >= 400:
            return status
    return None


def reason(error: BaseException) -> str:
    """A few words on why it failed, without the address."""
    links = chain(error)
    for link in links:
        status = status_of(link)
        if status is not None:
            known = status in HTTPStatus._value2member_map_
            return f"HTTP {status} {HTTPStatus(status).phrase if known else ''}".strip()
    if any("Timeout" in type(link).__name__ for link in links):
        return "no answer in time"
    for link in reversed(links):  # the deepest is the plainest: "Connection refused"
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
    if isinstance(error, FileNotFoundError):
        return "not found"
    text = str(links[-1]).strip() or type(links[-1]).__name__
    return re.sub(r"https?://\S+", lambda address: shown(address[0]), text.splitlines()[0])


# --- Patience -------------------------------------------------------------------------------------------


class Patience:
    """How long something has failed already, and when it is tried again."""

    def __init__(self, what: str, minutes: float, say: Say) -> None:
        self.what, self.minutes, self.say = what, minutes, say
        self.renew()

    def renew(self) -> None:
        """Count from now."""
        self.since, self.wait = time.monotonic(), FIRST_WAIT

    def bear(self, error: Exception) -> None:
        """Wait before the next try. ConfigError if trying again does not help, or has not for too long;
        errors that have nothing to do with files are raised as they are."""
        if isinstance(error, ConfigError):
            raise error
        if not is_transient(error):
            links = chain(error)
            if not any(isinstance(link, OSError) or status_of(link) for link in links):
                raise error
            raise ConfigError(
                f"{self.what} cannot be read: {reason(error)}; check the address and who may read it"
            ) from error
        lasted = time.monotonic() - self.since
        left = 60 * self.minutes - lasted
        if left <= 0:
            raise ConfigError(
                f"{self.what} could not be read for {duration(lasted)}: {reason(error)}; check the address "
                "and the network and start again, or wait longer with data.patience_minutes"
            ) from error
        wait = min(self.wait, left)
        self.say(f"{self.what}: {reason(error)}; next try in {wait:.0f} s, failing for {duration(lasted)}")
        time.sleep(wait)
        self.wait = min(2 * self.wait, LONGEST_WAIT)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def patiently(task: Callable[[], T], *, what: str, minutes: float, say: Say) -> T:
    """The result of `task`, tried again after every transient failure, for `minutes`. Before each wait `say`
    gets one line. ConfigError that names `what` after a permanent failure, or when the time is over."""
    patience = Patience(what, minutes, say)
    while True:
        try:
            return task()
        except Exception as error:
            failure = error  # handled outside, so that the next failure is not chained to this one
        patience.bear(failure)


def resumed(open_stream: Callable[[], Iterator[T]], *, what: str, minutes: float, say: Say) -> Iterator[T]:
    """Every item of a stream once, in order: after a transient failure it is opened again, and the items that
    were given already are skipped. The stream must give the same items each time; one that has become shorter
    is a ConfigError. `minutes` count from when the next item was asked for."""
    patience = Patience(what, minutes, say)
    stream: Iterator[T] | None = None
    given = 0
    while True:
        try:
            if stream is None:
                stream = open_stream()
                for _ in range(given):
                    if next(stream, stream) is stream:
                        raise ConfigError(f"{what} became shorter while it was read; start again")
            item = next(stream, stream)  # the stream itself marks the end
        except Exception as error:
            failure = error
        else:
            if item is stream:
                return
            given += 1
            yield item  # type: ignore[misc]
            patience.renew()
            continue
        stream = None
        patience.bear(failure)


@contextmanager
def single_tries() -> Iterator[None]:
    """Stop `datasets` from repeating a failed read for minutes in silence; with a compressed file it would
    also go on at a wrong place. For streams that `resumed` opens again."""
    config = datasets.config
    names = [name for name in vars(config) if name.startswith("STREAMING_")]
    before = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, 1 if name.endswith("MAX_RETRIES") else 0)  # it waits after the last try, too
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


# --- Files ----------------------------------------------------------------------------------------------


def describe(url: str) -> RemoteFile:
    """Size and version of a file, from its first byte (many signed addresses forbid HEAD). Raises OSError for
    what `is_transient` judges, and ConfigError if the server does not tell the size."""
    with requests.Session() as session, answer(session, url, 0, 1) as response:
        size = full_size(response)
        if response.status_code == 200:  # a whole body; its Content-Length may be that of a part
            size = confirmed(session, url, size)
        if size is None:
            raise ConfigError(
                f"{shown(url)}: the server does not tell the size of the file, so that a missing part would "
                "not be noticed; download it and use the copy"
            )
        return RemoteFile(size, version(response))


def confirmed(session: requests.Session, url: str, size: int | None) -> int | None:
    """The size, asked for once more in another way."""
    head = session.head(
        url,
        headers={"Accept-Encoding": "identity"},
        allow_redirects=True,
        timeout=(CONNECT_SECONDS, READ_SECONDS),
    )
    told = head.headers.get("Content-Length") if head.status_code == 200 else None
    if told is None:
        return size
    if size not in (None, int(told)):
        raise IncompleteError(f"the server tells two sizes, {told} and {size} bytes")
    return int(told)


@contextmanager
def answer(session: requests.Session, url: str, start: int, stop: int) -> Iterator[requests.Response]:
    """The answer to a request for bytes [start, stop): they (206), the whole file (200), or neither (416)."""
    with session.get(
        url,
        headers={"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"},
        stream=True,
        timeout=(CONNECT_SECONDS, READ_SECONDS),
    ) as response:
        if response.status_code not in (200, 206, 416):
            response.raise_for_status()
            raise ConfigError(
                f"{shown(url)}: unexpected answer, HTTP {response.status_code}; check the address"
            )
        coding = response.headers.get("Content-Encoding", "identity")
        if coding != "identity" and not (coding == "gzip" and urlsplit(url).path.endswith(".gz")):
            raise ConfigError(
                f"{shown(url)}: the server compresses the file on the way ({coding}), so its size cannot "
                "be checked; download it and use the copy"
            )
        yield response


def full_size(response: requests.Response) -> int | None:
    """Bytes of the whole file, whatever part of it the answer holds."""
    if response.status_code == 200:
        told = response.headers.get("Content-Length", "")
    else:
        told = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(told) if told.isdecimal() else None


def version(response: requests.Response) -> str:
    return response.headers.get("ETag", "").removeprefix("W/") or response.headers.get("Last-Modified", "")


def pieces(response: requests.Response) -> Iterator[bytes]:
    """The body as it is on the server: `requests` would decompress it."""
    return response.raw.stream(1 << 16, decode_content=False)


class Reading:
    """What the files of one stream share: the patience, and what is known of each file."""

    def __init__(self, minutes: float, say: Say, known: Mapping[str, RemoteFile]) -> None:
        self.minutes, self.say, self.known = minutes, say, dict(known)
        self.copies: dict[str, BinaryIO] = {}

    def __deepcopy__(self, memo: dict) -> Reading:
        return self  # `datasets` copies its options; the files stay the same

    def patiently(self, task: Callable[[], T], url: str) -> T:
        return patiently(task, what=shown(url), minutes=self.minutes, say=self.say)

    def look(self, url: str) -> RemoteFile:
        """Size and version, asked for once."""
        if url not in self.known:
            self.known[url] = self.patiently(lambda: describe(url), url)
        return self.known[url]

    def keep(self, url: str, response: requests.Response) -> None:
        """Copy a whole file to a nameless temporary one, for a server that does not answer Range."""
        with ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile())
            for piece in pieces(response):
                file.write(piece)
            file.flush()
            size = self.look(url).size
            if file.tell() != size:
                raise IncompleteError(f"{file.tell()} of {size} bytes came")
            weakref.finalize(self, stack.pop_all().close)
        self.copies[url] = file


class WholeFile(AbstractBufferedFile):
    """A file on a server of which every read is complete, and of one version."""

    def __init__(self, fs: WholeFileSystem, url: str, reading: Reading) -> None:
        self.url, self.reading, self.session = url, reading, requests.Session()
        super().__init__(fs, url, block_size=BLOCK_BYTES, cache_type="readahead", size=reading.look(url).size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end), in as many answers as it takes."""
        data = self.reading.patiently(partial(self.some, start, end), self.url)
        while len(data) < end - start:
            time.sleep(FIRST_WAIT)  # a part came: no failure, but no reason to hurry
            data += self.reading.patiently(partial(self.some, start + len(data), end), self.url)
        return data

    def some(self, start: int, end: int) -> bytes:
        """At least one byte from `start` on, at most up to `end`."""
        if self.url not in self.reading.copies:
            with answer(self.session, self.url, start, end) as response:
                self.check(response, start)
                if response.status_code == 206:
                    return received(response, end - start)
                self.reading.keep(self.url, response)
        return os.pread(self.reading.copies[self.url].fileno(), end - start, start)

    def check(self, response: requests.Response, start: int) -> None:
        """Whether the answer is of the same file as before, and from `start` on."""
        known, size, status = self.reading.look(self.url), full_size(response), response.status_code
        same = not known.version or not version(response) or known.version == version(response)
        if not same or (status != 200 and size not in (None, known.size)):
            raise ConfigError(
                f"{shown(self.url)} changed since it was listed; restore it, or remove the folder listings in"
                " data.cache_dir and start again, to take it as it is now"
            )
        if status == 416:
            raise IncompleteError("the server refuses a part of the file")
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise IncompleteError("the server sends another part of the file")

    def close(self) -> None:
        self.session.close()
        super().close()


def received(response: requests.Response, most: int) -> bytes:
    """The body up to `most` bytes, or the part of it that came before the connection failed; never empty."""
    data = bytearray()
    try:
        for piece in pieces(response):
            data += piece
            if len(data) > most:  # not at `most`: a body read to its end leaves the connection open
                break
    except (OSError, urllib3.exceptions.HTTPError):
        if not data:
            raise
    if not data:
        raise IncompleteError("the server sends nothing")
    return bytes(data[:most])


class WholeFileSystem(AbstractFileSystem):
    """Single files, by their address with PREFIX. `reading` is a Reading; `encoding` and `errors` are what
    `datasets` says when it opens a text."""

    protocol = (f"{PREFIX}http", f"{PREFIX}https")
    cachable = False

    def __init__(self, reading: Reading, encoding: str = "utf-8", errors: str | None = None, **_) -> None:
        super().__init__()
        self.reading, self.text = reading, {"encoding": encoding, "errors": errors}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def info(self, path: str, **_) -> dict:
        file = self.reading.look(path.removeprefix(PREFIX))
        return {"name": path, "size": file.size, "type": "file", "ETag": file.version}

    def glob(self, path: str, maxdepth: int | None = None, detail: bool = False, **_) -> dict | list:
        return {path: self.info(path)} if detail else [path]  # an address is one file, whatever it holds

    def open(self, path: str, mode: str = "rb", **options):
        return super().open(path, mode, **({} if "b" in mode else self.text), **options)

    def _open(self, path: str, mode: str = "rb", **_) -> WholeFile:
        return WholeFile(self, path.removeprefix(PREFIX), self.reading)


for _protocol in WholeFileSystem.protocol:
    fsspec.register_implementation(_protocol, WholeFileSystem, clobber=True)


def streamed(
    urls: list[str], *, minutes: float, say: Say, known: Mapping[str, RemoteFile] | None = None
) -> dict:
    """The arguments of `datasets.load_dataset` that make it read these addresses whole: `data_files` and
    `storage_options`. A file of `known` must still be the one that was described; `minutes` and `say` are
    those of `patiently`, counted anew for every part of a file."""
    reading = Reading(minutes, say, known or {})
    return {
        "data_files": [PREFIX + url for url in urls],
        "storage_options": {protocol: {"reading": reading} for protocol in WholeFileSystem.protocol},
    }


def opened(url: str, *, minutes: float, say: Say, known: Mapping[str, RemoteFile] | None = None) -> WholeFile:
    """The same for one file, as a binary file object; for example to look at its Parquet schema."""
    return WholeFileSystem(Reading(minutes, say, known or {}))._open(PREFIX + url)
