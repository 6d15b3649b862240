"""The documents of a unit, streamed by `datasets`, from here or from a server that may fail."""

from __future__ import annotations

import glob
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import pyarrow as pa

from configs.errors import ConfigError
from data.remote import RemoteFile, is_transient, is_url, resumed, single_tries, streamed
from data.sources import Say, Unit

DOCUMENT_CHARACTERS = 1 << 17  # a longer text file (a book) counts as several documents
BATCH_CHARACTERS = 1 << 21  # of text handed to the tokenizer at a time: enough to feed every core


def read(unit: Unit, *, minutes: float = 0.0, say: Say = print) -> Iterator[list[str]]:
    """The unit's documents in order, in batches of about BATCH_CHARACTERS. Empty documents are left out;
    bytes that are not UTF-8 become U+FFFD. A file that cannot be read is a ConfigError that names it; a
    server that does not answer is waited for, `minutes` long, and `say` is told."""
    left = unit.limit
    batch: list[str] = []
    size = 0
    stream = documents(unit, minutes, say)
    if unit.remote and not is_url(unit.files[0]):  # the hub; an http file has patience of its own
        stream = resumed(lambda: documents(unit, minutes, say), what=unit.files[0], minutes=minutes, say=say)
    for document in stream:
        if left is not None:
            left -= len(document.encode())
            if left < 0:
                break
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def documents(unit: Unit, minutes: float, say: Say) -> Iterator[str]:
    for table in tables(unit, minutes, say):
        column = table[unit.column]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            if pa.types.is_null(column.type):
                continue
            raise ConfigError(
                f"text_column: {unit.column!r} of {unit.files[0]} holds {column.type}, not text"
            )
        for text in filter(None, column.to_pylist()):
            yield from cut(text) if unit.builder == "text" else (text,)


def cut(text: str) -> Iterator[str]:
    """A text in pieces of at most DOCUMENT_CHARACTERS, cut after a line end where there is one."""
    start = 0
    while len(text) - start > DOCUMENT_CHARACTERS:
        stop = text.rfind("\n", start, start + DOCUMENT_CHARACTERS) + 1 or start + DOCUMENT_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def tables(unit: Unit, minutes: float, say: Say) -> Iterator[pa.Table]:
    """The unit's rows as Arrow tables."""
    with tempfile.TemporaryDirectory() as scratch, quietly(), single_tries():  # scratch: for lock files
        try:
            stream = open_stream(unit, scratch, minutes, say)
            for part in row_groups(stream, unit.row_groups):
                for table in part.with_format("arrow").iter(256):
                    check_column(unit, table.column_names)
                    yield table
        except StopIteration:  # the library's answer to a file without rows
            return
        except (OSError, EOFError, zlib.error, ValueError, RuntimeError, pa.ArrowException) as error:
            if isinstance(error, ConfigError) or (unit.remote and is_transient(error)):
                raise
            raise unreadable(unit, error) from error


def unreadable(unit: Unit, error: BaseException) -> ConfigError:
    reason, *more = str(error).splitlines() or [type(error).__name__]
    if missing := re.match(r"No match for FieldRef.*? in (.*)", reason):  # pyarrow's, with its own columns
        fields = [field.partition(":")[0] for field in (missing[1], *more)]
        return no_column(unit, [field for field in fields if not field.startswith("__")])
    return ConfigError(f"{unit.files[0]} cannot be read as {unit.builder}: {reason}")


def open_stream(unit: Unit, scratch: str, minutes: float, say: Say) -> datasets.IterableDataset:
    options: dict[str, Any] = {"data_files": list(unit.files)}
    if is_url(unit.files[0]):
        known = {url: RemoteFile(*it) for url, it in zip(unit.files, unit.known, strict=True)}
        options = streamed(list(unit.files), minutes=minutes, say=say, known=known)
    elif not unit.remote:
        options = {"data_files": [glob.escape(file) for file in unit.files]}
    if unit.builder == "text":
        options |= {"sample_by": "document", "encoding_errors": "replace"}
    if unit.builder == "parquet":
        options |= {"columns": [unit.column], "batch_size": 1024}  # its own is that of a row group, maybe 0
    return datasets.load_dataset(unit.builder, split="train", streaming=True, cache_dir=scratch, **options)


def row_groups(
    stream: datasets.IterableDataset, wanted: tuple[int, int] | None
) -> Iterator[datasets.IterableDataset]:
    if wanted is None:
        yield stream
        return
    parts = stream.reshard()  # one for each row group
    for index in range(*wanted):
        yield parts.shard(num_shards=parts.num_shards, index=index)


def check_column(unit: Unit, present: list[str]) -> None:
    if unit.column not in present:
        raise no_column(unit, present)


def no_column(unit: Unit, present: list[str]) -> ConfigError:
    names = ", ".join(present)
    return ConfigError(f"text_column: {unit.column!r} is not a column of {unit.files[0]}; it has {names}")


@contextmanager
def quietly() -> Iterator[None]:
    """Stop `datasets` from reporting the use of a local file to the hub, and from printing what we raise."""
    counts, level = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.logging.get_verbosity()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(level)
