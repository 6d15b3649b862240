"""Where documents come from: files here, on servers and on the hub, as units.

A unit is what becomes one shard: some megabytes of text files, one JSONL or Arrow file, or some row groups of
a Parquet file. Its fingerprint covers the name, size and content (of a remote file: the version) of every
file, so that a changed file is a new unit. What was found is kept in a listing: remote places are looked at
once, local files are hashed once, and shards that were copied are used where their source is not.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow.parquet as pq

from configs.errors import ConfigError
from data.config import BUILTIN, DataConfig, SourceConfig
from data.files import checksum, hashed, sealed
from data.remote import RemoteFile, describe, is_url, opened, patiently, shown

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (".py", ".sh", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java", ".js", ".ts")
ROWS = {".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow"}
BUILDER = dict.fromkeys(PROSE + CODE, "text") | ROWS
PACKED = ("", ".gz", ".zst")  # of text and JSONL

LARGEST_PYTHON_FILE = 200_000  # bytes; larger ones are tables and generated code
UNIT_BYTES = 8 << 20  # text files of about this size share a shard
ROW_GROUPS_BYTES = 64 << 20  # uncompressed text of a unit of Parquet row groups
MANY_FILES = 512  # of more Parquet files each is one unit: their row groups are not looked up
AT_ONCE = 16  # requests to a server

Say = Callable[[str], None]


@dataclass(frozen=True)
class File:
    """A file as it was found. ``version``: the hash of its content, or what its server calls this state."""

    name: str  # within its source, the same wherever the source lies
    path: str  # or URL
    size: int
    version: str
    changed: int = 0  # when, in nanoseconds, of a local file


@dataclass(frozen=True)
class Unit:
    """What becomes one shard. ``size`` is the files' on disk, ``limit`` the most text taken, in bytes,
    ``row_groups`` the first of a Parquet file and the one after the last, ``known`` the size and version of
    each file on a server."""

    files: tuple[str, ...]
    builder: str
    column: str
    size: int
    limit: int | None
    row_groups: tuple[int, int] | None
    known: tuple[tuple[int, str], ...]
    fingerprint: str

    @staticmethod
    def from_dict(fields: dict) -> Unit:
        """A unit as `dataclasses.asdict` and JSON gave it."""
        rows = fields["row_groups"]
        own = {"files": tuple(fields["files"]), "row_groups": tuple(rows) if rows else None}
        own["known"] = tuple((size, version) for size, version in fields["known"])
        return Unit(**(fields | own))

    @property
    def remote(self) -> bool:
        return "://" in self.files[0]


@dataclass(frozen=True)
class Listing:
    """A source's units in a fixed, random-like order, its bytes on disk (of which max_bytes may take a part)
    and the number of files of unknown kind."""

    units: list[Unit]
    source_bytes: int
    ignored_files: int


def find_units(name: str, source: SourceConfig, config: DataConfig, say: Say) -> Listing:
    """The listing of a source, kept in `config.cache_dir`. Remote places are looked at once: remove the
    listing's file to look again. Raises ConfigError where there is no text."""
    place = (source.files, source.dataset, source.subset, source.split, source.revision)
    path = Path(config.cache_dir).expanduser() / "listings"
    path /= f"{hashed(place, source.text_column, config.max_bytes, UNIT_BYTES, ROW_GROUPS_BYTES)}.json"
    kept, known = read_listing(path)
    if kept and any(unit.remote for unit in kept.units):
        return kept
    try:
        listing, files = look(name, source, config, known, say)
    except NotFound as error:
        if kept is None:
            raise
        say(f"{error}; going on with the shards that were made of it")
        return kept
    if (kept, known) != (listing, files):
        path.parent.mkdir(parents=True, exist_ok=True)
        with sealed(path) as file:
            file.write(
                json.dumps({**asdict(listing), "files": [asdict(f) for f in files]}, indent=1).encode()
            )
    return listing


class NotFound(ConfigError):
    """A local source is not where it is said to be."""


def read_listing(path: Path) -> tuple[Listing | None, list[File]]:
    try:
        kept = json.loads(path.read_text())
        units = [Unit.from_dict(fields) for fields in kept["units"]]
        files = [File(**fields) for fields in kept["files"]]
        return Listing(units, kept["source_bytes"], kept["ignored_files"]), files
    except (OSError, ValueError, TypeError, KeyError):
        return None, []


def look(
    name: str, source: SourceConfig, config: DataConfig, known: list[File], say: Say
) -> tuple[Listing, list[File]]:
    """The source as it is now. `known` files are not hashed again while size and time are the same."""
    if source.dataset:
        files, builder, ignored = hub_files(name, source, config, say)
    else:
        paths, builder, ignored = files_of(name, source)
        files = [*local_files(paths, known), *remote_files(paths, config, say)]
    files = sorted((file for file in files if file.size), key=lambda file: file.name)
    if not files:
        raise ConfigError(f"{key_of(name)}: every file is empty; add text")
    found = {"source_bytes": sum(file.size for file in files), "ignored_files": ignored}

    chosen = files if config.max_bytes is None else fitting(files, config.max_bytes)
    column = "text" if builder == "text" else source.text_column
    spare = max(1.0, (config.max_bytes or 0) / found["source_bytes"])  # what is compressed holds more text
    stretch = 2 ** int(math.log2(spare))  # in steps, so that another file seldom changes what is taken of all
    split = len(files) <= MANY_FILES
    units = units_of(chosen, builder, column, split=split, stretch=stretch, config=config, say=say)
    return Listing(sorted(units, key=lambda unit: unit.fingerprint), **found), files


def units_of(
    files: list[File], builder: str, column: str, *, split: bool, stretch: int, config: DataConfig, say: Say
) -> list[Unit]:
    """The units of the files; with max_bytes, `stretch` times what they have on disk is the most that is
    taken of their text, until all of it is given."""
    left = math.inf if config.max_bytes is None else config.max_bytes
    units = []
    for group in grouped(files, UNIT_BYTES if builder == "text" else 0):
        ranges = row_group_ranges(group[0], builder, column, config, say) if split else [(None, 1.0)]
        for rows, share in ranges:
            size = max(1, int(share * sum(file.size for file in group)))
            limit = None if left == math.inf else int(min(left, stretch * size))
            if builder == "text" and len(files) > 1:
                limit = None  # whole files were chosen
            left -= stretch * size
            contents = [(file.name, file.size, file.version) for file in group]
            unit = Unit(
                files=tuple(file.path for file in group),
                builder=builder,
                column=column,
                size=size,
                limit=limit,
                row_groups=rows,
                known=tuple((file.size, file.version) for file in group if is_url(file.path)),
                fingerprint=hashed("unit", contents, builder, column, limit, rows),
            )
            units.append(unit)
            if left <= 0:
                return units
    return units


def key_of(name: str) -> str:
    """How a source is called in messages."""
    return "data.path" if name == "text" else f"data.sources.{name}"


def files_of(name: str, source: SourceConfig) -> tuple[dict[str, str], str, int]:
    """{name: path or URL} of a source's files, the `datasets` builder that reads them, and the number of
    files of unknown kind."""
    found: dict[str, str] = {}
    for number, pattern in enumerate(source.files):
        label = f"{number}/" if len(source.files) > 1 else ""
        found |= {label + at: path for at, path in matches(name, pattern).items()}
    known = {at: path for at, path in found.items() if builder_of(path)}
    if not known:
        endings = " ".join(BUILDER)
        raise ConfigError(
            f"{key_of(name)}: no file to read in {' '.join(source.files)}; known endings are {endings}"
        )
    examples = {builder_of(known[at]): at for at in sorted(known, reverse=True)}
    if len(examples) > 1:
        kinds = " and ".join(f"{kind} ({at})" for kind, at in sorted(examples.items()))
        raise ConfigError(
            f"{key_of(name)}: {' '.join(source.files)} mixes {kinds} files; give files of one kind"
        )
    return known, next(iter(examples)), len(found) - len(known)


def matches(name: str, pattern: str) -> dict[str, str]:
    """{name: path or URL} for one entry of `files`."""
    if pattern == BUILTIN:
        return python_files()
    if "://" in pattern:
        if not is_url(pattern):
            raise ConfigError(f"{key_of(name)}: {pattern} is neither a file nor an http(s) URL")
        return {url.partition("://")[2]: url for url in braces(pattern)}
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        return walk(pattern)
    if os.path.isfile(pattern):
        return {os.path.basename(pattern): os.path.abspath(pattern)}
    paths = [os.path.abspath(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    if not paths:
        raise NotFound(f"{key_of(name)}: {pattern} does not exist")
    root = os.path.abspath(os.path.dirname(pattern.partition("*")[0].partition("?")[0].partition("[")[0]))
    return {os.path.relpath(path, root).replace(os.sep, "/"): path for path in paths}


def braces(pattern: str) -> list[str]:
    """A URL with ranges such as {000..013} as all the URLs it stands for."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    return [url for n in numbers for url in braces(pattern[: found.start()] + n + pattern[found.end() :])]


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


def walk(root: str) -> dict[str, str]:
    """{path below root: path} of every file, without hidden ones and without installed packages."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be listed: {error.strerror}; mend its permissions")

    files = {}
    for folder, subfolders, names in os.walk(os.path.abspath(root), onerror=refuse):
        subfolders[:] = [s for s in subfolders if s[0] != "." and s not in ("site-packages", "dist-packages")]
        for name in names:
            path = os.path.join(folder, name)
            if name[0] != "." and os.path.isfile(path):
                files[os.path.relpath(path, root).replace(os.sep, "/")] = path
    return files


def builder_of(path: str) -> str:
    """The `datasets` builder for a file of this name or URL; empty for an unknown ending."""
    name = (path.partition("?")[0] if is_url(path) else path).lower()
    for ending, builder in BUILDER.items():
        if name.endswith(tuple(ending + packing for packing in PACKED if not packing or builder == "json")):
            return builder
    return ""


def local_files(paths: dict[str, str], known: list[File]) -> Iterator[File]:
    before = {(file.path, file.size, file.changed): file.version for file in known}
    for name, path in paths.items():
        if "://" not in path:
            state = os.stat(path)
            same = before.get((path, state.st_size, state.st_mtime_ns))
            yield File(name, path, state.st_size, same or checksum(path), state.st_mtime_ns)


def remote_files(paths: dict[str, str], config: DataConfig, say: Say) -> Iterator[File]:
    """Every URL with its size and version, asked for a few at a time."""

    def ask(item: tuple[str, str]) -> File:
        name, url = item
        found = patiently(lambda: describe(url), what=shown(url), minutes=config.patience_minutes, say=say)
        return File(name, url, found.size, found.version)

    urls = [(name, path) for name, path in paths.items() if "://" in path]
    if urls:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(ask, urls)


def hub_files(name: str, source: SourceConfig, config: DataConfig, say: Say) -> tuple[list[File], str, int]:
    """The files of a hub dataset at the revision that it has now; their URLs hold it."""
    where = f"{key_of(name)}.dataset: {source.dataset}"

    def resolve() -> tuple[list[str], str]:
        builder = datasets.load_dataset_builder(str(source.dataset), source.subset, revision=source.revision)
        data_files = builder.config.data_files or {}
        if source.split not in data_files:
            splits = ", ".join(map(str, data_files)) or "none"
            raise ConfigError(f"{key_of(name)}.split: {source.split!r} is not a split; it has {splits}")
        return list(data_files[source.split]), type(builder).__module__.rpartition(".")[2]

    try:
        urls, builder = patiently(resolve, what=where, minutes=config.patience_minutes, say=say)
    except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:  # no such subset, or gated
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {' '.join(str(error).splitlines()[:2])}") from error
    if builder not in set(BUILDER.values()):
        raise ConfigError(
            f"{where}: its files are of kind {builder}; use one of text, JSONL, Parquet or Arrow"
        )
    folder = os.path.commonpath([os.path.dirname(url.removeprefix("hf://")) for url in urls])

    def list_folder() -> dict[str, dict]:  # at once: some datasets have tens of thousands of files
        return fsspec.filesystem("hf").find(folder, detail=True)

    found = patiently(list_folder, what=where, minutes=config.patience_minutes, say=say)
    paths = [url.removeprefix("hf://") for url in urls]
    files = [File(path.partition("/")[2], f"hf://{path}", found[path]["size"], "") for path in paths]
    return files, builder, 0


def open_file(file: File, config: DataConfig, say: Say) -> Any:
    """A file for reading bytes, wherever it lies."""
    if is_url(file.path):
        known = {file.path: RemoteFile(file.size, file.version)}
        return opened(file.path, minutes=config.patience_minutes, say=say, known=known)
    return fsspec.open(file.path, "rb").open()


def fitting(files: list[File], most: int) -> list[File]:
    """The files that fit into `most` bytes, taken in the order of a hash of their names: a fair sample that
    grows, never changes, with `most`. At least one file."""
    chosen: set[str] = set()
    used = 0
    for file in sorted(files, key=lambda file: hashed(file.name)):
        used += file.size
        if chosen and used > most:
            break
        chosen.add(file.name)
    return [file for file in files if file.name in chosen]


def grouped(files: list[File], target: int) -> Iterator[list[File]]:
    """Consecutive files in groups of `target` bytes or a little more."""
    group: list[File] = []
    held = 0
    for file in files:
        group.append(file)
        held += file.size
        if held >= target:
            yield group
            group, held = [], 0
    if group:
        yield group


def row_group_ranges(
    file: File, builder: str, column: str, config: DataConfig, say: Say
) -> list[tuple[tuple[int, int] | None, float]]:
    """Ranges of row groups of a large Parquet file with their shares of its bytes; None: everything."""
    if builder != "parquet" or file.size < ROW_GROUPS_BYTES // 4:
        return [(None, 1.0)]

    def footer() -> list[int]:
        with open_file(file, config, say) as content:
            found = pq.ParquetFile(content).metadata
            at = found.schema.names.index(column) if column in found.schema.names else 0
            groups = (found.row_group(i) for i in range(found.num_row_groups))
            return [max(1, g.column(at).total_uncompressed_size) for g in groups]

    try:
        sizes = patiently(footer, what=file.path, minutes=config.patience_minutes, say=say)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file.path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    ranges: list[tuple[tuple[int, int] | None, float]] = []
    first, held = 0, 0
    for at, size in enumerate(sizes):
        held += size
        if held >= ROW_GROUPS_BYTES or at == len(sizes) - 1:
            ranges.append(((first, at + 1), held / sum(sizes)))
            first, held = at + 1, 0
    return ranges if len(ranges) > 1 else [(None, 1.0)]
