"""How fast data is made and read, and what it wastes; one core, the machine's own text.

    python -m tests.bench.data --text DIR --out FILE      DIR: text, JSONL or Parquet, such as the corpus of
                                                          `python -m launch.corpus`; without it, Python files

Every result is a line of JSON: `tokenize` (DeepSeek-V4's tokenizer, and the engine it replaces), `assemble`
and `padding` (warm batches at several lengths, V4 tokens), `resume` (a fresh process, a million documents)
and `plan` (a hundred million documents of log-normal lengths; nothing is read).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from data.config import DataConfig, Shape, SourceConfig, TokenizerConfig
from data.corpus import Corpus
from data.opening import Data, open_data, prepare
from data.order import Cursor, Stream
from data.reading import read
from data.shards import Documents, Shard
from data.sources import Unit
from data.tokenizer import Tokenizer, difficult_strings, plain_encoder

V4 = TokenizerConfig("deepseek_v4", vocab_size=129_280)
LENGTHS = (2048, 4096, 8192, 16384)
STRINGS = 60_000
Result = dict[str, object]
T = TypeVar("T")


def tokenize(config: DataConfig, cache: Path) -> Result:
    """Megabytes of text a second on one thread, and whether the tokens are those of `tokenizers`."""
    prepared = prepare(config, say=print)
    texts: list[str] = []
    for unit in prepared.tasks.values():
        texts += [text for batch in read(unit) for text in batch]
        if sum(map(len, texts)) > 40_000_000:
            break
    size = sum(len(text.encode()) for text in texts)
    fast = Tokenizer(prepared.tokenizer.path, fast_v4=True, threads=1)
    fast.encode_batch(texts[:10])
    seconds, ids = timed(lambda: fast.encode_batch(texts))
    few = texts[: max(1, len(texts) // 8)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    plain = plain_encoder(json.loads(prepared.tokenizer.to_json()))
    slow, plain_ids = timed(lambda: plain(few))
    fuzz = difficult_strings(STRINGS, seed=7)
    differ = sum(a.tolist() != b for a, b in zip(fast.encode_batch(fuzz), plain(fuzz), strict=True))
    differ += sum(a.tolist() != b for a, b in zip(ids, plain_ids))
    return {
        "megabytes": size / 1e6,
        "mb_per_s": size / 1e6 / seconds,
        "tokens_per_s": sum(map(len, ids)) / seconds,
        "tokenizers_mb_per_s": sum(len(text.encode()) for text in few) / 1e6 / slow,
        "bytes_per_token": size / sum(map(len, ids)),
        "strings_compared": STRINGS + len(few),
        "strings_that_differ": differ,
    }


def assemble(config: DataConfig, seq_len: int) -> Iterator[Result]:
    """Batches of 64 sequences, everything that training gets, with every checksum verified."""
    shape = Shape(64, seq_len)
    data = open_data(config, lambda _: shape, mtp_depth=1, seed=1)
    stream = data.train._streams["text"]
    plan, window = timed(lambda: stream._planned(Cursor(seq_len=seq_len)))
    position, drawn = data.train._start, []
    for _ in range(min(200, 40_000_000 // (64 * seq_len))):
        sequences, position = data.train._draw(position, shape)
        drawn.append(sequences)
    for sequences in drawn[:3]:
        data.train._assembled(sequences, 64, seq_len)
    seconds, batches = timed(lambda: [data.train._assembled(s, 64, seq_len) for s in drawn])
    cells = len(drawn) * 64 * seq_len
    planned = sum(piece.length for sequence in window.sequences for piece in sequence)
    yield {
        "kind": "assemble",
        "seq_len": seq_len,
        "mtok_per_s": cells / seconds / 1e6,
        "with_planning_mtok_per_s": 1e-6 / (seconds / cells + plan / planned),
        "batches": len(drawn),
        "padding": 1 - sum(int((batch["document_ids"] >= 0).sum()) for batch in batches) / cells,
    }
    yield {"kind": "padding", "seq_len": seq_len} | padding(data, seq_len)


def padding(data: Data, seq_len: int) -> Result:
    """Of the whole first epoch, from lengths alone."""
    stream = data.train._streams["text"]
    cursor, sequences, tokens, cut = stream.at(Cursor(), seq_len), 0, 0, 0
    while cursor.epoch == 0:
        window = stream.window(cursor)
        sequences += len(window.sequences)
        pieces = [piece for sequence in window.sequences for piece in sequence]
        tokens += sum(piece.length for piece in pieces)
        cut += sum(piece.start > 0 for piece in pieces)
        cursor = Cursor(window.epoch, window.group, window.start, seq_len)
    return {
        "sequences": sequences,
        "tokens": tokens,
        "padding": 1 - tokens / (sequences * seq_len),
        "cuts": cut,
    }


def write_documents(path: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    words = np.array([f"w{i:x}" for i in range(4096)])
    with path.open("w") as file:
        for start in range(0, count, 10_000):
            picked = words[draw.integers(0, len(words), (10_000, 12))]
            file.writelines(
                json.dumps({"text": f"{start + i} " + " ".join(row)}) + "\n" for i, row in enumerate(picked)
            )


CHILD = """
import sys, time, json
began = time.perf_counter()
from tests.bench.data import million
from data.opening import open_data
from data.config import Shape
imported = time.perf_counter()
data = open_data(million(sys.argv[1]), lambda _: Shape(64, 4096), mtp_depth=1, seed=1)
if len(sys.argv) > 2:
    data.train.load_state_dict(json.loads(sys.argv[2]))
    data.train.batch()
    print(json.dumps([imported - began, time.perf_counter() - imported, data.summary["documents"]]))
else:
    for _ in range(20): data.train.batch()
    print(json.dumps(data.train.state_dict()))
"""


def million(folder: str) -> DataConfig:
    return DataConfig(path=f"{folder}/*.jsonl", cache_dir=f"{folder}/cache", tokenizer=V4)


def resume(folder: Path, documents: int) -> Result:
    """Seconds from nothing but shards and a state to the first batch, in a fresh process."""
    for part in range(4):
        write_documents(folder / f"{part}.jsonl", documents // 4)

    def child(*arguments: str) -> str:
        command = [sys.executable, "-c", CHILD, str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    state = child()
    imported, seconds, found = json.loads(child(state))
    return {"documents": found, "import_s": imported, "first_batch_s": seconds, "state_bytes": len(state)}


def plan(documents: int) -> Result:
    """The first windows of a source of so many documents, at 4096 and at 65536 tokens."""
    draw = np.random.default_rng(0)
    lengths = np.empty(documents, np.uint32)
    for start in range(0, documents, 1 << 22):
        part = lengths[start : start + (1 << 22)]
        part[:] = np.clip(draw.lognormal(6.3, 1.1, len(part)), 8, 2e6)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    class Lengths(Corpus):
        def documents(self, units, *, held_out, order=(0, 0)):
            return Documents([shard], [np.arange(documents, dtype=np.uint32)], order)

    shard = Shard.__new__(Shard)
    shard.lengths = lengths
    unit = Unit(("x",), "text", "text", 1, None, None, (), "x")
    corpus = Lengths(
        "x", [unit], lambda _: shard, SourceConfig(files=["x"]), validation_fraction=0.1, shuffle_shards=None
    )
    stream = Stream(corpus, seed=1)
    found: Result = {"documents": documents, "tokens": int(lengths.sum(dtype=np.int64))}
    for seq_len in (4096, 65536):
        first, cursor = timed(partial(stream.at, Cursor(), seq_len))
        start = stream.window(cursor).start
        more, cursor = timed(partial(stream.at, Cursor(start=start), seq_len))
        planned = sum(piece.length for sequence in stream.window(cursor).sequences for piece in sequence)
        found |= {f"first_window_s_{seq_len}": first, f"window_s_{seq_len}": more}
        found[f"window_tokens_{seq_len}"] = planned
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"index_gb": 8 * documents / 1e9, "peak_gb_over_lengths": (after - before) / 1e6}


def timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="folder of documents")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="tokenize,assemble,resume,plan")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = {"text": SourceConfig(files=[args.text or "builtin:python"])}
    hardware = {"machine": f"{platform.machine()}, {cpu()}", "python": platform.python_version()}

    def keep(result: Result) -> None:
        print(json.dumps(result))
        with args.out.open("a") as file:
            file.write(json.dumps(result | hardware) + "\n")

    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        config = DataConfig(
            sources=sources, cache_dir=f"{scratch}/cache", tokenizer=V4, max_bytes=300_000_000
        )
        if "tokenize" in args.only:
            keep({"kind": "tokenize"} | tokenize(config, Path(scratch)))
        if "assemble" in args.only:
            for result in chain.from_iterable(assemble(config, seq_len) for seq_len in LENGTHS):
                keep(result)
        if "resume" in args.only:
            folder = Path(scratch) / "million"
            folder.mkdir()
            keep({"kind": "resume"} | resume(folder, 1_000_000))
    if "plan" in args.only:
        keep({"kind": "plan"} | plan(100_000_000))


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
