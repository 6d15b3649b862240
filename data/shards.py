"""Tokenized documents on disk: sealed Arrow files, built once, read as views of the page cache.

A shard is named by the hash of its unit, the tokenizer and the format. It becomes visible only when complete,
and a JSON manifest beside it holds its counts and checksum: a shard that fails its checksum is built again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from data.files import checksum, hashed, sealed
from data.sources import Unit, read
from data.tokenizer import Tokenizer

FORMAT = 1  # of a shard; a change here makes every shard anew
DOCUMENTS_PER_BATCH = 1000
SCHEMA = pa.schema({"input_ids": pa.large_list(pa.uint32()), "key": pa.uint64()})


@dataclass(frozen=True)
class Manifest:
    """What a shard holds. ``bytes`` counts UTF-8 text, ``tokens`` the end mark of every document too."""

    documents: int
    tokens: int
    bytes: int
    checksum: str


def document_key(text: str) -> int:
    """64 bits of a hash of a document: equal texts always fall on the same side of a split."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def shard_path(unit: Unit, tokenizer: Tokenizer, folder: Path) -> Path:
    """Where the unit's shard lies, there or not."""
    return folder / f"{hashed('shard', FORMAT, unit.fingerprint, tokenizer.fingerprint)}.arrow"


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a shard that is complete and intact, else None."""
    try:
        manifest = Manifest(**json.loads(path.with_suffix(".json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return manifest if path.exists() and checksum(path) == manifest.checksum else None


def open_shards(
    units: list[Unit], tokenizer: Tokenizer, folder: Path, *, progress: bool
) -> dict[Path, Manifest]:
    """The units' shards, in order. Those missing or damaged are built, by one process while others wait."""
    paths = [shard_path(unit, tokenizer, folder) for unit in units]
    manifests = [read_manifest(path) for path in paths]
    if None in manifests:
        with FileLock(folder / "lock"):
            build_missing(dict(zip(paths, units, strict=True)), tokenizer, progress=progress)
        manifests = [read_manifest(path) for path in paths]
    return {path: manifest for path, manifest in zip(paths, manifests, strict=True) if manifest}


def build_missing(units: dict[Path, Unit], tokenizer: Tokenizer, *, progress: bool) -> None:
    missing = {path: unit for path, unit in units.items() if read_manifest(path) is None}
    for path in missing:
        for draft in path.parent.glob(f".{path.stem}.*.tmp"):  # of a build that was killed
            draft.unlink()
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=sum(unit.size for unit in missing.values()))
        for path, unit in missing.items():
            build(unit, tokenizer, path)
            bar.advance(task, unit.size)


def build(unit: Unit, tokenizer: Tokenizer, path: Path) -> None:
    """Tokenize a unit into a sealed shard."""
    documents = tokens = size = 0
    end = np.array([tokenizer.eos_id], np.uint32)
    with sealed(path) as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for texts in read(unit):
            ids = [np.concatenate([found, end]) for found in tokenizer.encode_batch(texts)]
            keys = [document_key(text) for text in texts]
            for start in range(0, len(ids), DOCUMENTS_PER_BATCH):
                part = slice(start, start + DOCUMENTS_PER_BATCH)
                writer.write_batch(record_batch(ids[part], keys[part]))
            documents += len(ids)
            tokens += sum(map(len, ids))
            size += sum(len(text.encode()) for text in texts)
    manifest = Manifest(documents, tokens, size, checksum(path))
    with sealed(path.with_suffix(".json")) as file:
        file.write(json.dumps(asdict(manifest)).encode())


def record_batch(ids: list[np.ndarray], keys: list[int]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    lists = pa.LargeListArray.from_arrays(offsets, np.concatenate(ids))
    return pa.RecordBatch.from_arrays([lists, pa.array(keys, pa.uint64())], schema=SCHEMA)


class Documents:
    """The documents of some shards, or a choice of them, as zero-copy views.

    Attributes: lengths (int64, tokens with the end mark), keys (uint64), fingerprint.
    """

    def __init__(self, shards: dict[Path, Manifest]):
        columns = [
            Dataset.from_file(str(path)).data for path, manifest in shards.items() if manifest.documents
        ]
        lists = [chunk for table in columns for chunk in table.column("input_ids").chunks]
        starts = [chunk.offsets.to_numpy()[:-1] for chunk in lists]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in lists]
        self._start = joined(starts, np.int64)
        self._chunk = np.repeat(np.arange(len(lists)), [len(s) for s in starts])
        self.lengths = joined([np.diff(chunk.offsets.to_numpy()) for chunk in lists], np.int64)
        self.keys = joined([table.column("key").to_numpy() for table in columns], np.uint64)
        self.fingerprint = hashed("documents", [m.checksum for m in shards.values()])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._start[index]
        return self._values[self._chunk[index]][start : start + self.lengths[index]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def choose(self, mask: np.ndarray) -> Documents:
        """The documents where the mask is set, still as views."""
        chosen = object.__new__(Documents)
        chosen._values = self._values
        chosen._start, chosen._chunk = self._start[mask], self._chunk[mask]
        chosen.lengths, chosen.keys = self.lengths[mask], self.keys[mask]
        chosen.fingerprint = hashed("choice", self.fingerprint, np.packbits(mask).tobytes())
        return chosen


def joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
