"""Tokenized documents on disk: sealed Arrow files, built once, read as views of the page cache.

A shard is named by the hash of its unit, the tokenizer and the format. It becomes visible only when complete.
A JSON manifest beside it holds its counts and checksums. Lengths, keys and the checksum of every document are
verified when a shard is opened, a document's tokens whenever they are read: damage is never trained on.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
from datasets import Dataset

from configs.errors import ConfigError
from data.files import checksum, hashed, sealed
from data.reading import read
from data.sources import Say, Unit
from data.tokenizer import Tokenizer

FORMAT = 2  # of a shard; a change here makes every shard anew
DOCUMENTS_PER_BATCH = 1000
SCHEMA = pa.schema({"input_ids": pa.large_list(pa.uint32()), "key": pa.uint64(), "crc": pa.uint32()})


@dataclass(frozen=True)
class Manifest:
    """What a shard holds. ``bytes`` counts UTF-8 text, ``tokens`` the end mark of every document too;
    ``index`` is the checksum of all lengths, keys and documents' checksums, ``checksum`` the file's;
    ``files`` are those that it was made of."""

    documents: int
    tokens: int
    bytes: int
    index: str
    checksum: str
    files: list[str]


def document_key(text: str) -> int:
    """64 bits of a hash of a document: equal texts always fall on the same side of a split."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def shard_path(unit: Unit, tokenizer: Tokenizer, folder: Path) -> Path:
    """Where the unit's shard lies, there or not."""
    return folder / "shards" / f"{hashed('shard', FORMAT, unit.fingerprint, tokenizer.fingerprint)}.arrow"


def read_manifest(path: Path, *, whole: bool = False) -> Manifest | None:
    """The manifest of a shard that is there, else None. With `whole` its file's checksum is verified, too."""
    try:
        fields = dict(json.loads(path.with_suffix(".json").read_text()))
        seal = fields.pop("seal", "")
        manifest = Manifest(**fields)
    except (OSError, ValueError, TypeError):
        return None
    if seal != hashed(fields):
        return None
    good = checksum(path) == manifest.checksum if whole and path.exists() else path.exists()
    return manifest if good else None


def build(
    unit: Unit,
    tokenizer: Tokenizer,
    path: Path,
    *,
    minutes: float = 0.0,
    say: Say = print,
    advance: Callable[[int], None] = lambda size: None,
) -> None:
    """Tokenize a unit into a sealed shard. `minutes` and `say` are those of `read`; `advance` is told the
    bytes of text that each batch had. Raises ConfigError if what was there before was of other content."""
    count = tokens = size = 0
    end = np.array([tokenizer.eos_id], np.uint32)
    index = Index()
    before = read_manifest(path)
    with sealed(path) as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for texts in read(unit, minutes=minutes, say=say):
            ids = [np.concatenate([found, end]) for found in tokenizer.encode_batch(texts)]
            keys = [document_key(text) for text in texts]
            for start in range(0, len(ids), DOCUMENTS_PER_BATCH):
                part = slice(start, start + DOCUMENTS_PER_BATCH)
                batch = record_batch(ids[part], keys[part])
                writer.write_batch(batch)
                index.add(batch)
            done = sum(len(text.encode()) for text in texts)
            advance(done)
            size += done
            count += len(ids)
            tokens += sum(map(len, ids))
        if before and before.index != index.checksum():
            raise ConfigError(
                f"{path}: is damaged, and {unit.files[0]} gives other tokens now; remove it to use them"
            )
    manifest = Manifest(count, tokens, size, index.checksum(), checksum(path), list(unit.files))
    with sealed(path.with_suffix(".json")) as file:
        file.write(json.dumps(asdict(manifest) | {"seal": hashed(asdict(manifest))}).encode())


def record_batch(ids: list[np.ndarray], keys: list[int]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    lists = pa.LargeListArray.from_arrays(offsets, np.concatenate(ids))
    crcs = [crc32(i.data) for i in ids]
    return pa.RecordBatch.from_arrays(
        [lists, pa.array(keys, pa.uint64()), pa.array(crcs, pa.uint32())], schema=SCHEMA
    )


class Index:
    """The checksum of what says where documents are and what they should be."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)

    def add(self, batch: pa.RecordBatch) -> None:
        lists, keys, crcs = batch.columns
        for array in (np.diff(lists.offsets.to_numpy()), keys.to_numpy(), crcs.to_numpy()):
            self._hash.update(np.ascontiguousarray(array).data)

    def checksum(self) -> str:
        return self._hash.hexdigest()


class Shard:
    """A sealed shard, as views of its file.

    Attributes: lengths (uint32, tokens with the end mark), manifest. Raises Damaged when its index is not
    what the manifest says. `repair(path)` is called when a document's tokens are not what they should be.
    """

    def __init__(self, path: Path, repair: Callable[[Path], None] | None = None):
        self.path = path
        self._repair = repair
        self._open()

    def _open(self) -> None:
        manifest = read_manifest(self.path)
        if manifest is None:
            raise Damaged(f"{self.path}: the shard or its manifest is missing or cannot be read")
        self.manifest = manifest
        try:
            batches = Dataset.from_file(str(self.path)).data.to_batches() if manifest.documents else []
            index = self._view(batches)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise Damaged(f"{self.path}: {str(error).splitlines()[0]}") from error
        if index != manifest.index:
            raise Damaged(f"{self.path}: its index is damaged")

    def _view(self, batches: list[pa.RecordBatch]) -> str:
        """Take views of all columns; the checksum of their index."""
        index = Index()
        for batch in batches:
            if batch.schema.types != SCHEMA.types:
                raise ValueError("its schema is damaged")
            batch.validate()  # that all buffers are as long as they should be: beyond is other memory
            index.add(batch)
        self._offsets = [batch.column(0).offsets.to_numpy() for batch in batches]
        self._values = [batch.column(0).values.to_numpy(zero_copy_only=True) for batch in batches]
        self._keys = [batch.column(1).to_numpy() for batch in batches]
        self._crcs = [batch.column(2).to_numpy() for batch in batches]
        self._first = np.cumsum([0, *map(len, batches)]).tolist()
        self.lengths = joined([np.diff(offsets) for offsets in self._offsets], np.uint32)
        return index.checksum()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def keys(self) -> np.ndarray:
        """The documents' keys, uint64."""
        return joined(self._keys, np.uint64)

    def tokens(self, row: int) -> np.ndarray:
        """The ids (uint32) of one document. Raises Damaged when they cannot be made anew."""
        for attempt in range(2):
            batch = bisect_right(self._first, row) - 1
            at = row - self._first[batch]
            start, stop = self._offsets[batch][at : at + 2].tolist()
            ids = self._values[batch][start:stop]
            if crc32(ids.data) == self._crcs[batch][at]:
                return ids
            if attempt == 0 and self._repair:
                self._repair(self.path)
                self._open()
        raise Damaged(
            f"{self.path}: document {row} is damaged; restore the file, or remove it to make it anew"
        )


class Damaged(ConfigError):
    """A shard that is not what its manifest says."""


class Documents:
    """Chosen documents of some shards, still as views: 8 bytes of memory for each.

    Attributes: lengths (uint32, tokens with the end mark), order (which of a stream's groups this is).
    """

    def __init__(self, shards: Sequence[Shard], rows: Sequence[np.ndarray], order: tuple[int, int] = (0, 0)):
        self._shards = list(shards)
        self._rows = joined(list(rows), np.uint32)
        self._first = np.cumsum([0, *map(len, rows)]).tolist()
        self.lengths = joined([s.lengths[r] for s, r in zip(shards, rows, strict=True)], np.uint32)
        self.order = order

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of all documents together."""
        return int(self.lengths.sum(dtype=np.int64))

    def again(self, order: tuple[int, int]) -> Documents:
        """The same documents as another group."""
        same = copy(self)
        same.order = order
        return same

    def __getitem__(self, index: int) -> np.ndarray:
        shard = bisect_right(self._first, index) - 1
        return self._shards[shard].tokens(int(self._rows[index]))


def joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
