"""Benchmark results as a Markdown table: `python -m tests.bench.table tests/bench/results/*_h100_*.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = ("model", "sequence", "rows × steps", "side", "tokens/s", "MFU", "peak memory", "hardware")


def row(line: str) -> str | None:
    """One table row of a result of `tests.bench.train_step`, or None for lines of other files."""
    result = json.loads(line)
    if "side" not in result:
        return None
    side = result["side"] + (", compiled" if result["compile"] else "")
    shape = f"{result['batch']} × {result['accumulate']}"
    speed = ("out of memory", "", "")
    if "error" not in result:
        speed = (f"{result['tokens_per_s']:,.0f}", f"{result['mfu']:.1%}", f"{result['gib']:.1f} GiB")
    hardware = f"{result['device']}, torch {result['torch']}"
    return "| " + " | ".join((result["model"], str(result["seq_len"]), shape, side, *speed, hardware)) + " |"


def main(paths: list[str]) -> None:
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for path in paths:
        for line in Path(path).read_text().splitlines():
            if text := row(line):
                print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
