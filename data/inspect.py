"""`python -m data.inspect`: what a run will train on, in the terminal and as a page."""

from __future__ import annotations

if __name__ == "inspect":  # `python data/FILE.py` has put data/ where Python looks for its own `inspect`
    raise SystemExit("error: start it from the root of the repository: python -m data.NAME")

import argparse
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from configs.errors import ConfigError
from data.findings import Findings, Holdings, Packing, Sample, Stage, bins, histogram, look
from data.prepare import exit_code

HELP = """\
Look at what a run will train on: python -m data.inspect [KEY=VALUE ...] [--html FILE]
                                                         [--sequences N] [--first NUMBER]

Give it the arguments of your training command. It shows documents, tokens and lengths of every source, how
often the run goes over them, how they are packed into sequences, and N (2) of the run's sequences as text,
from its first one on or from NUMBER: long documents are shortened, marks such as a document's end stand out,
control characters read \\x1b.

  python -m data.inspect data.path=texts                         before the first run on texts of one's own
  python -m data.inspect data.path=texts --html texts.html       with plots, as one file to keep or to show
  python -m data.inspect experiment=nano data=mixture phases=v4_lengths --sequences 8
  python -m data.inspect ... --first 4097 --sequences 16         what a spike was trained on (spikes.jsonl)

What to look for:
  left out     by min_tokens, max_tokens and deduplicate of a source: more than meant?
  epochs       how often a source is repeated; much above 4, more text serves better than more epochs
  efficiency   the share of a sequence that is text; the rest is padding, and computed in vain
  cut          documents longer than a sequence: the model sees each of their parts as a document

Shards that are missing are made first, as training would. With data.shuffle_shards, where training does not
wait for all, only what is ready is looked at; a source without any shard gets its first one.
"""
BAR = 20  # characters of the longest bar
WORDS = ("source", "phase")  # columns that hold no numbers
COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
STYLES = {"text": "", "mark": "reverse", "hidden": "bold red", "gap": "italic bright_black"}


class Grid(NamedTuple):
    """A table as text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 for a mistake or a source that cannot be read (one line), 130 when interrupted."""
    return exit_code(argv, HELP, run)


def run(argv: list[str]) -> None:
    """Look, print, and write the page."""
    overrides, page, first, count = arguments(argv)
    from configs.compose import compose

    config = compose(overrides)
    weights = {name: source.weight for name, source in config.data.chosen().items()}
    tokens, stages = config.timeline.tokens, []
    for phase in config.timeline:
        stages.append(
            Stage(
                phase.name, phase.seq_len, tokens(phase.stop) - tokens(phase.first), phase.weights or weights
            )
        )
    errors = Console(stderr=True, highlight=False, markup=False)

    def say(text: str) -> None:
        errors.print(f"warning: {text}", style="yellow", soft_wrap=True)

    found = look(
        config.data,
        stages,
        seed=config.train.seed,
        count=count,
        first=first,
        say=say,
        progress=errors.is_terminal,
    )
    console = Console(highlight=False, markup=False, emoji=False)
    show(found, console)
    if page:
        from data.page import write

        write(page, found, shlex.join(overrides))
        console.print(f"\nthe page is in {page}", soft_wrap=True)


def arguments(argv: list[str]) -> tuple[list[str], Path | None, int, int]:
    """What is for Hydra, the page's file, the first sequence to show, and how many. Raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--first", type=int, default=1)
    try:
        found, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(
            f"{error.argument_name}: {error.message}; see python -m data.inspect --help"
        ) from error
    if found.sequences < 0:
        raise ConfigError(f"--sequences: {found.sequences} must be 0 or more")
    if found.first < 1:
        raise ConfigError(f"--first: {found.first} must be 1 or more")
    if found.html and not found.html.parent.is_dir():
        raise ConfigError(f"--html: {found.html.parent} is no folder; make it, or choose another")
    return overrides, found.html, found.first, found.sequences


def grids(found: Findings) -> list[Grid]:
    """The tables, for the terminal and for the page."""
    rows = [row_of(held, found) for held in found.holdings]
    there = ["source", "shards", "MB of text", "to train on", "held out", "left out"]
    tokens = ["source", "tokens", "bytes/token", "p10", "p50", "p90", "longest"]
    run = ["source", "weight", "share", "tokens it takes", "to train on", "epochs"]
    packing = ["phase", "source", "sequence", "share", "efficiency", "documents in it", "cut"]
    named = slice(0 if any(stage.name for stage in found.stages) else 1, None)  # no column of empty names
    return [
        Grid("documents", there, [row[0] for row in rows]),
        Grid("tokens, and those of a document", tokens, [row[1] for row in rows]),
        Grid("the run", run, [row[2] for row in rows]),
        Grid("packing", packing[named], [packing_row(p)[named] for p in found.packings]),
    ]


def row_of(held: Holdings, found: Findings) -> tuple[list[str], list[str], list[str]]:
    """A source's rows of the first three tables."""
    name, train = held.source, len(held.lengths)
    counts = [f"{n:,}" for n in (train, held.held_out, held.documents - train - held.held_out)]
    tokens = [f"{held.tokens:,}", f"{held.bytes / max(1, held.tokens):.2f}", *quantiles(held.lengths)]
    share = found.taken(held) / sum(packing.taken for packing in found.packings)
    use = [f"{held.weight:g}", f"{share:.1%}", f"{found.taken(held):,.0f}", f"{held.to_train_on:,}"]
    epochs = ("~" if held.ready < held.shards else "") + few(found.epochs(held))
    return (
        [name, f"{held.ready}/{held.shards}", f"{held.bytes / 1e6:,.1f}", *counts],
        [name, *tokens],
        [name, *use, epochs],
    )


def packing_row(packing: Packing) -> list[str]:
    stage = packing.stage
    row = [stage.name, packing.source, f"{stage.seq_len:,}", f"{packing.share:.1%}"]
    return [*row, f"{packing.efficiency:.2%}", f"{packing.documents:.2f}", f"{packing.cut:.1%}"]


def quantiles(lengths: np.ndarray) -> list[str]:
    """Lengths that a tenth, half, nine tenths and all of the documents do not exceed."""
    if not len(lengths):
        return ["-"] * 4
    return [f"{n:,}" for n in np.quantile(lengths, [0.1, 0.5, 0.9, 1.0], method="inverted_cdf").tolist()]


def few(number: float) -> str:
    """With two or three digits that say something."""
    return f"{number:,.{0 if number >= 100 else 2}f}" if number >= 0.095 else f"{number:.2g}"


def show(found: Findings, console: Console) -> None:
    """Print everything; `console` must not take what is in documents for markup."""
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    for grid in grids(found):
        table = Table(title=grid.title, title_justify="left", box=SIMPLE_HEAD)
        for head in grid.head:
            table.add_column(head, justify="left" if head in WORDS else "right", overflow="fold")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)
    for held in found.holdings:
        console.print(bars(held), "")
    for sample in found.samples:
        print_sample(sample, console)


def bars(held: Holdings) -> Table:
    """How many of a source's documents, and of its tokens, are in documents of each length."""
    title = f"{held.source}: documents to train on, by length"
    table = Table("tokens", "documents", "their tokens", title=title, title_justify="left", box=None)
    table.columns[0].justify = "right"
    borders = bins(int(held.lengths.max(initial=1)), 1)
    counts, tokens = (part / max(1, part.sum()) for part in histogram(held.lengths, borders))
    for at in range(np.flatnonzero([*counts, 1])[0], len(counts)):
        cells = [f"{part[at]:6.1%} {bar(part[at] / part.max())}" for part in (counts, tokens)]
        table.add_row(f"{borders[at]:,} to {borders[at + 1] - 1:,}", *cells)
    return table


def bar(share: float) -> str:
    """Of BAR characters for 1, in eighths."""
    whole, eighths = divmod(round(share * BAR * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def print_sample(sample: Sample, console: Console) -> None:
    """A sequence as text, a coloured rule above each of its documents."""
    size = f"{sample.seq_len:,} tokens, {sample.padding:,} of them padding"
    console.print(f"sequence {sample.number} of the run: {size}", style="bold")
    for at, document in enumerate(sample.documents):
        title = Text(" · ".join(heading(sample, at)))
        console.print(Rule(title, align="left", style=COLOURS[at % len(COLOURS)], characters="━"))
        console.print(Text.assemble(*((text, STYLES[kind]) for text, kind in document.runs)))
    if more := len(sample.boxes) - len(sample.documents):
        console.print(f"··· {more:,} more documents ···", style=STYLES["gap"])
    console.print()


def heading(sample: Sample, at: int) -> list[str]:
    """What is above a document."""
    document = sample.documents[at]
    place = f"{at + 1} of {len(sample.boxes)}"
    return [place, sample.source, f"{document.tokens:,} tokens", *document.marks]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
