"""Documents as files of every kind that Fourfold reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

KINDS = ("txt", "jsonl", "jsonl.gz", "ndjson.zst", "parquet", "arrow")
ROW_GROUP = 20  # rows


def write_file(path: Path, documents: Sequence[str | None], column: str = "body") -> None:
    """One file of documents, of the kind that its name says; a text file is one document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.partition(".")[2]
    table = pa.table({"n": range(len(documents)), column: pa.array(documents, pa.string())})
    lines = "".join(json.dumps({"n": i, column: text}) + "\n" for i, text in enumerate(documents)).encode()
    if kind == "txt":
        path.write_text("".join(text or "" for text in documents))
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=ROW_GROUP)
    elif kind == "arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=ROW_GROUP)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif kind == "ndjson.zst":
        path.write_bytes(zstandard.compress(lines))
    else:
        assert kind == "jsonl"
        path.write_bytes(lines)


def write_folder(folder: Path, kind: str, documents: list[str]) -> None:
    """The documents as files of one kind, some of them in subfolders, in the order of the files' names."""
    if kind == "txt":
        for i, text in enumerate(documents):
            write_file(folder / f"{i // 50}" / f"{i:03d}.txt", [text])
        return
    third = len(documents) // 3
    write_file(folder / f"a.{kind}", documents[:third])
    write_file(folder / "b" / f"c.{kind}", documents[third:])
