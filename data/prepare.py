"""`python -m data.prepare`: tokenize everything that a run needs, before the run or on another machine."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError
from data.build import Beside, Maker, make_all, noted, progress_bar
from data.config import DataConfig
from data.files import hashed
from data.opening import Prepared, prepare
from data.shards import read_manifest
from data.tokenizer import Tokenizer

HELP = """\
Tokenize the configured sources: python -m data.prepare [KEY=VALUE ...]

Give it the arguments of your training command: the sources (data=..., data.path=...), the tokenizer and, for
a BPE, the vocabulary must be the same. Shards that are there are verified by their checksums; damaged and
missing ones are made. It may be stopped or killed at any moment, and goes on where it stopped.

  python -m data.prepare data.path=texts                          the text that a laptop run would use
  python -m data.prepare experiment=nano data=python_v4 model.vocab_size=129280
  python -m data.prepare data=mixture data.workers=32             more processes than cores

Everything is written into data.cache_dir (.cache/data). Copy that folder to a machine without the sources,
and training there, with the same arguments, uses it: local sources may be missing, servers are not asked.
"""


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 for a mistake or a source that cannot be read (one line), 130 when interrupted."""
    return exit_code(argv, HELP, run)


def exit_code(argv: list[str], text: str, work: Callable[[list[str]], None]) -> int:
    """Do the work, or print the help; what goes wrong is one line."""
    if {"-h", "--help"} & set(argv):
        print(text)
        return 0
    try:
        work(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr, flush=True)
        return 130
    return 0


def run(argv: list[str]) -> None:
    """Prepare and say what there is."""
    if argv == ["--beside"]:
        beside()
    from configs.compose import compose

    config, console = compose(argv).data, Console(stderr=True, highlight=False)
    began = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    prepared = prepare(config, say=say)
    before = prepared.summary()["shards_ready"]
    failures = noted(note(config, prepared))
    with failures, progress_bar(prepared.tasks, console.is_terminal, console) as advance:
        maker = Maker(prepared.tokenizer, config.patience_minutes, say, advance)
        make_all(prepared.tasks, maker, config.workers, whole=True)
    seconds = time.perf_counter() - began
    output = Console(highlight=False)
    output.print(table(prepared))
    counts = f"{len(prepared.tasks) - int(before)} shards made, {int(before)} verified"
    output.print(f"{counts} in {seconds:.1f} s; they are in {config.cache_dir}", markup=False, soft_wrap=True)


def note(config: DataConfig, prepared: Prepared) -> Path:
    return Path(config.cache_dir).expanduser() / f"failed-{hashed(*prepared.tasks)}"


def table(prepared: Prepared) -> Table:
    """Shards, documents, tokens and text by source."""
    found = Table("source", "shards", "documents", "tokens", "MB of text", "bytes a token")
    paths = {unit.fingerprint: path for path, unit in prepared.tasks.items()}
    for name, listing in prepared.listings.items():
        manifests = [m for unit in listing.units if (m := read_manifest(paths[unit.fingerprint]))]
        tokens, size = sum(m.tokens for m in manifests), sum(m.bytes for m in manifests)
        documents = f"{sum(m.documents for m in manifests):,}"
        ratio = f"{size / max(1, tokens):.2f}"
        found.add_row(name, str(len(manifests)), documents, f"{tokens:,}", f"{size / 1e6:,.1f}", ratio)
    return found


def beside() -> NoReturn:
    """Make shards for a training that writes its wishes to standard input, and end with it."""
    order = Beside.from_json(sys.stdin.readline())

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    tokenizer = Tokenizer(order.tokenizer, fast_v4=order.fast_v4)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with noted(order.note):
        maker = Maker(tokenizer, order.config.patience_minutes, say, lambda size: say(f"done: {size}"))
        make_all(order.tasks, maker, order.config.workers)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
