"""Where documents come from: files, grouped into units, read as batches of text.

A unit is what becomes one shard: some megabytes of text files, or one JSONL or Parquet file. Its fingerprint
covers the name, size and content of every file, so that a changed file is a new unit.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ConfigError
from data.config import DataConfig
from data.files import checksum, hashed

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (".py", ".sh", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java", ".js", ".ts")
BUILDER = dict.fromkeys(PROSE + CODE, "text") | {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}

LARGEST_PYTHON_FILE = 200_000  # bytes; larger ones are tables and generated code
UNIT_BYTES = 8 << 20  # text files of about this size share a shard
DOCUMENT_CHARACTERS = 1 << 17  # a longer text file (a book) counts as several documents
BATCH_CHARACTERS = 1 << 21  # of text handed to the tokenizer at a time: enough to feed every core


@dataclass(frozen=True)
class Unit:
    """Files that become one shard. ``size`` is theirs on disk, ``limit`` the most text taken, in bytes."""

    files: tuple[str, ...]
    builder: str
    column: str
    size: int
    limit: int | None
    fingerprint: str


def find_units(config: DataConfig) -> tuple[list[Unit], dict[str, int]]:
    """The units of the configured source in a fixed order, and what was found: `source_bytes` on disk (of
    which max_bytes may take a part) and `ignored_files` of unknown kind. ConfigError if there is no text."""
    if config.path is None:
        named, builder, ignored = python_files(), "text", 0
    else:
        named, builder, ignored = files_under(os.path.expanduser(config.path))
    sizes = {name: os.path.getsize(path) for name, path in named.items()}
    named = {name: path for name, path in sorted(named.items()) if sizes[name]}
    if not named:
        raise ConfigError(f"data.path: every file in {config.path} is empty; add text")
    found = {"source_bytes": sum(sizes.values()), "ignored_files": ignored}

    limits: dict[str, int | None] = dict.fromkeys(named)
    if config.max_bytes is not None and builder == "text":
        named = fitting(named, sizes, config.max_bytes)
    elif config.max_bytes is not None:  # every file gives its share, whatever its compression
        share = config.max_bytes / found["source_bytes"]
        limits = {name: max(1, int(share * sizes[name])) for name in named}

    units = []
    column = "text" if builder == "text" else config.text_column
    for names in grouped(list(named), sizes, UNIT_BYTES if builder == "text" else 0):
        contents = [(name, sizes[name], checksum(named[name])) for name in names]
        fingerprint = hashed("unit", contents, builder, column, limits[names[0]], DOCUMENT_CHARACTERS)
        files = tuple(named[name] for name in names)
        units.append(
            Unit(files, builder, column, sum(sizes[n] for n in names), limits[names[0]], fingerprint)
        )
    return units, found


def python_files() -> dict[str, str]:
    """{name: path} of the Python files of the running standard library and of torch."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.submodule_search_locations
    roots = {"python": sysconfig.get_paths()["stdlib"], "torch": torch.submodule_search_locations[0]}
    return {
        f"{label}/{name}": path
        for label, root in roots.items()
        for name, path in walk(root).items()
        if name.endswith(".py") and os.path.getsize(path) <= LARGEST_PYTHON_FILE
    }


def files_under(path: str) -> tuple[dict[str, str], str, int]:
    """{name: path} of a person's folder or file, the `datasets` builder that reads them, and the number of
    files of unknown kind."""
    if not os.path.exists(path):
        raise ConfigError(f"data.path: {path} does not exist")
    found = walk(path) if os.path.isdir(path) else {os.path.basename(path): path}
    known = {name: path for name, path in found.items() if builder_of(name)}
    if not known:
        raise ConfigError(f"data.path: no file to read in {path}; known endings are {' '.join(BUILDER)}")
    examples = {builder_of(name): name for name in sorted(known, reverse=True)}
    if len(examples) > 1:
        kinds = " and ".join(f"{kind} ({name})" for kind, name in sorted(examples.items()))
        raise ConfigError(
            f"data.path: {path} mixes {kinds} files; point to a folder of one kind, or to one file"
        )
    return known, next(iter(examples)), len(found) - len(known)


def walk(root: str) -> dict[str, str]:
    """{path below root: path} of every file, without hidden ones and without installed packages."""
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s[0] != "." and s not in ("site-packages", "dist-packages")]
        for name in names:
            path = os.path.join(folder, name)
            if name[0] != "." and os.path.isfile(path):
                files[os.path.relpath(path, root).replace(os.sep, "/")] = path
    return files


def builder_of(name: str) -> str:
    """The `datasets` builder for a file of this name; empty for an unknown ending."""
    return next((builder for suffix, builder in BUILDER.items() if name.lower().endswith(suffix)), "")


def fitting(named: dict[str, str], sizes: dict[str, int], most: int) -> dict[str, str]:
    """The files that fit into `most` bytes, taken in the order of a hash of their names: a fair sample that
    grows, never changes, with `most`. At least one file."""
    chosen: set[str] = set()
    used = 0
    for name in sorted(named, key=hashed):
        used += sizes[name]
        if chosen and used > most:
            break
        chosen.add(name)
    return {name: path for name, path in named.items() if name in chosen}


def grouped(names: list[str], sizes: dict[str, int], target: int) -> Iterator[list[str]]:
    """Consecutive names in groups of `target` bytes or a little more."""
    group: list[str] = []
    held = 0
    for name in names:
        group.append(name)
        held += sizes[name]
        if held >= target:
            yield group
            group, held = [], 0
    if group:
        yield group


def read(unit: Unit) -> Iterator[list[str]]:
    """The unit's documents in order, in batches of about BATCH_CHARACTERS. Empty documents are left out;
    bytes that are not UTF-8 become U+FFFD. A file that cannot be read is a ConfigError that names it."""
    left = unit.limit
    batch: list[str] = []
    size = 0
    for document in documents(unit):
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


def documents(unit: Unit) -> Iterator[str]:
    for table in tables(unit):
        column = table[unit.column]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            if pa.types.is_null(column.type):
                continue
            raise ConfigError(
                f"data.text_column: {unit.column!r} of {unit.files[0]} holds {column.type}, not text"
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


def tables(unit: Unit) -> Iterator[pa.Table]:
    """The unit's rows as Arrow tables, streamed by `datasets`."""
    options: dict = {"text": {"sample_by": "document", "encoding_errors": "replace"}}.get(unit.builder, {})
    with tempfile.TemporaryDirectory() as scratch, local_only():  # the library leaves lock files behind
        try:
            if unit.builder == "parquet":
                check_column(unit, pq.read_schema(unit.files[0]).names)
                options = {"columns": [unit.column]}
            stream = datasets.load_dataset(
                unit.builder,
                data_files=[glob.escape(file) for file in unit.files],
                split="train",
                streaming=True,
                cache_dir=scratch,
                **options,
            )
            for table in stream.with_format("arrow").iter(256):
                check_column(unit, table.column_names)
                yield table
        except StopIteration:  # the library's answer to a file without rows
            return
        except (OSError, EOFError, zlib.error, ValueError, RuntimeError, pa.ArrowException) as error:
            if isinstance(error, ConfigError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"data.path: {unit.files[0]} cannot be read as {unit.builder}: {reason}"
            ) from error


def check_column(unit: Unit, present: list[str]) -> None:
    if unit.column not in present:
        names = ", ".join(present)
        raise ConfigError(
            f"data.text_column: {unit.column!r} is not a column of {unit.files[0]}; it has {names}"
        )


@contextmanager
def local_only() -> Iterator[None]:
    """Stop `datasets` from reporting the use of a local file to the hub, and from printing what we raise."""
    counts, level = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.logging.get_verbosity()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(level)
