"""Text whose passages come again, so that attention has places to find: data for `tests.bench.warmup`.

    python -m tests.bench.recurring --out FOLDER [--bytes 100_000_000]

A document is some passages of the Python files that are always there, then the same ones again and again,
each time in another order. From the second round on all but a passage's first tokens can be read off its last
occurrence, some hundreds of tokens back. Writes FOLDER/recurring.jsonl, the same for one Python and torch.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from data.sources import python_files

CHARACTERS = 220  # of a passage, at least: 60 to 70 tokens of a BPE with 16,384 ids


def passages(text: str) -> Iterator[str]:
    """Whole lines of the text, CHARACTERS at a time; the rest is left out."""
    passage = ""
    for line in text.splitlines(keepends=True):
        passage += line
        if len(passage) >= CHARACTERS:
            yield passage
            passage = ""


def documents(text: str, count: int, rounds: int, draw: random.Random) -> Iterator[str]:
    """Documents of `count` passages of the text, each in every one of `rounds`."""
    found = [passage for passage in passages(text) if len(passage) < 2 * CHARACTERS]
    for start in range(0, len(found) - count + 1, count):
        own = found[start : start + count]
        yield "".join("".join(draw.sample(own, count)) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=4, help="of a document")
    parser.add_argument("--rounds", type=int, default=8, help="how often each occurs")
    parser.add_argument("--bytes", type=int, default=100_000_000, help="of text, at most")
    options = parser.parse_args()
    shape = options.passages, options.rounds
    draw, left = random.Random(0), options.bytes
    files = sorted(python_files().items())
    draw.shuffle(files)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "recurring.jsonl").open("w", encoding="utf-8") as out:
        for _, path in files:
            for document in documents(Path(path).read_text(encoding="utf-8", errors="replace"), *shape, draw):
                left -= len(document.encode())
                if left < 0:
                    return
                out.write(json.dumps({"text": document}) + "\n")


if __name__ == "__main__":
    main()
