"""What a run will train on as one HTML page: no script, no other file, plots as SVG in it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

from configs.errors import ConfigError
from data.files import sealed
from data.findings import Box, Findings, Holdings, Packing, Sample, bins, histogram
from data.inspect import WORDS, Grid, grids, heading

WIDTH, HEIGHT = 640, 200  # of a plot
LEFT, RIGHT, TOP, BOTTOM = 44, 620, 20, 172  # of what its axes enclose
MOST_BOXES = 1500  # of a drawing of packed sequences
HUES = 6
STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #22262b; --soft: #68707a;
  --line: #e2e3df; --hidden: #b3261e;
  --c0: #2f6fb5; --c1: #c8601b; --c2: #2f8a4f; --c3: #8a4fb0; --c4: #9a7d0e; --c5: #1a8a99; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --card: #1d2126; --ink: #dfe2e6; --soft: #98a0aa; --line: #343a42;
  --hidden: #ff8a80;
  --c0: #6ea8e6; --c1: #eb9157; --c2: #6cc287; --c3: #c192e0; --c4: #d9bd55; --c5: #5cc3d1; } }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 68rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3, h4 { font-size: 1rem; margin: 0 0 .5rem; font-weight: 600; }
small, p, figcaption { color: var(--soft); font-weight: 400; }
p { margin: .3rem 0 1rem; max-width: 46rem; }
code, pre { font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 1.2rem 0 0; }
.facts b { display: block; font-size: 1.45rem; font-weight: 600; }
.note { border-left: 4px solid var(--c1); padding: .3rem .8rem; background: var(--card); color: var(--ink); }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem 0 .32rem 1.4rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); }
.word { text-align: left; padding: 0 1rem 0 0; } td.word { font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.narrow { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem;
  margin: 0; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border-radius: 2px; }
.key span { margin-right: 1.2rem; }
svg { display: block; width: 100%; } svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.axis { stroke: var(--line); } .limit { stroke: var(--soft); stroke-dasharray: 3 3; }
polyline { fill: none; stroke-width: 2; }
rect:hover { opacity: .7; }
.row { height: 13px; margin: 2px 0 0;
  background: repeating-linear-gradient(45deg, var(--line) 0 3px, transparent 3px 6px); }
.row rect { stroke: var(--card); vector-effect: non-scaling-stroke; fill: var(--own); }
.row .part { fill: color-mix(in srgb, var(--own) 40%, var(--card)); }
section { margin-top: 1rem !important; }
article { border-left: 5px solid var(--own); padding: .1rem 0 .1rem .9rem; margin: .9rem 0; }
h4 { margin: 0; font-size: .85rem; color: var(--own); }
pre { margin: .3rem 0 0; }
.mark { background: var(--own); color: var(--card); border-radius: 3px; padding: 0 .3em; }
.hidden { color: var(--hidden); font-weight: 700; } .gap { color: var(--soft); font-style: italic; }
"""


def write(path: Path, found: Findings, arguments: str) -> None:
    """Write the page: all of it, or nothing. `arguments` are those of the run. Raises ConfigError."""
    try:
        with sealed(path) as file:
            file.write(page(found, arguments).encode(errors="replace"))
    except OSError as error:
        raise ConfigError(f"--html: {path} cannot be written: {error.strerror}; choose another") from error


def page(found: Findings, arguments: str) -> str:
    """The page's source. Whatever comes from documents or from people is escaped."""
    there, tokens, run, packing = map(table, grids(found))
    lengths = [length_card(held, number, found) for number, held in enumerate(found.holdings)]
    samples = [sample_card(sample.number, sample) for sample in found.samples]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What this run trains on</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>What this run trains on</h1><p><code>python -m train {escape(arguments)}</code></p>
{"".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)}
{facts(found)}
<h2>The run</h2>
<p>What it takes of each source: its share of all tokens, and how often it goes over them.</p>{run}
<h2>Documents</h2>
<p>Held out for validation, by a hash of the text; left out by the filters of the source.</p>{there}
<h2>Lengths</h2>
<p>In tokens, with the end mark, of the documents to train on. Dashed: the length of a sequence.</p>{tokens}
<div class="cards">{"".join(lengths)}{cumulative_card(found)}</div>
<h2>Packing</h2>
<p>Whole documents share a sequence; only one that is longer is cut. Measured over the first window of each
source, the first sequences of which are drawn: a box is a document, a pale one a part of one that was cut,
hatching is padding.</p>{packing}
<div class="cards narrow">{"".join(map(packing_card, found.packings))}</div>
<h2>Sequences</h2>
<p>As the model reads them. Filled: a mark of the tokenizer. Red, such as <code class="hidden">\\x1b</code>: a
character without a shape of its own. Long documents are shortened.</p>{"".join(samples)}
</body></html>
"""


def facts(found: Findings) -> str:
    """The large numbers at the top."""
    sources = f"{len(found.holdings)} source{'s' * (len(found.holdings) > 1)}"
    shown = {
        "tokens of the run": short(sum(stage.tokens for stage in found.stages)),
        f"tokens to train on, of {sources}": short(sum(held.to_train_on for held in found.holdings)),
        "documents to train on": short(sum(len(held.lengths) for held in found.holdings)),
        "tokens of a sequence": " → ".join(dict.fromkeys(f"{stage.seq_len:,}" for stage in found.stages)),
    }
    items = (f"<div><b>{value}</b><small>{about}</small></div>" for about, value in shown.items())
    return f'<div class="facts">{"".join(items)}</div>'


def short(number: float) -> str:
    """Three digits and a unit: 1.23M."""
    for unit in ("", "K", "M", "B"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def table(grid: Grid) -> str:
    def line(tag: str, cells: list[str]) -> str:
        kinds = (' class="word"' if head in WORDS else "" for head in grid.head)
        return "".join(f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in zip(kinds, cells, strict=True))

    rows = "".join(f"<tr>{line('td', row)}</tr>" for row in grid.rows)
    return f'<div class="wide"><table><tr>{line("th", grid.head)}</tr>{rows}</table></div>'


def card(title: str, *parts: object, tag: str = "figure") -> str:
    return f'<{tag} class="card"><h3>{title}</h3>{"".join(map(str, parts))}</{tag}>'


def colour(number: int) -> str:
    return f"var(--c{number % HUES})"


def legend(names: dict[str, str]) -> str:
    """What the colours mean."""
    items = (f'<span><i style="background:{c}"></i>{escape(name)}</span>' for name, c in names.items())
    return f'<figcaption class="key">{"".join(items)}</figcaption>'


class Plot:
    """Shares, from 0 to `top`, over lengths on a logarithmic scale that is the same for all sources."""

    def __init__(self, found: Findings, top: float):
        every = [held.lengths for held in found.holdings if len(held.lengths)]
        self.low, self.high = min(map(np.min, every)), max(map(np.max, every)) + 1
        self.top, self.parts = top, list[str]()
        for share in (0, top / 2, top):
            self.straight("axis", LEFT, RIGHT, self.y(share), self.y(share))
            self.text(LEFT - 6, self.y(share) + 4, f"{share:.0%}", "end")
        for length in (10**power for power in range(9)):
            if self.low <= length <= self.high:
                self.text(self.x(length), HEIGHT - 10, f"{length:,}")
        for length in dict.fromkeys(stage.seq_len for stage in found.stages):
            if self.low <= length <= self.high:
                self.straight("limit", self.x(length), self.x(length), TOP - 6, BOTTOM)
                self.text(self.x(length), TOP - 9, f"{length:,}")

    def x(self, length: float) -> float:
        share = math.log(max(length, self.low) / self.low) / math.log(self.high / self.low)
        return LEFT + (RIGHT - LEFT) * min(1.0, share)

    def y(self, share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * share / self.top

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>')

    def straight(self, kind: str, x1: float, x2: float, y1: float, y2: float) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')

    def bar(self, begin: float, end: float, share: float, colour: str, about: str) -> None:
        x, y = self.x(begin), self.y(share)
        place = f'x="{x:.1f}" y="{y:.1f}" width="{max(1, self.x(end) - x - 1):.1f}" height="{BOTTOM - y:.1f}"'
        self.parts.append(f'<rect {place} fill="{colour}"><title>{about}</title></rect>')

    def line(self, lengths: Iterable[float], shares: Iterable[float], colour: str) -> None:
        points = (f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(lengths, shares, strict=True))
        self.parts.append(f'<polyline points="{" ".join(points)}" stroke="{colour}"/>')

    def __str__(self) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(self.parts)}</svg>'


def length_card(held: Holdings, number: int, found: Findings) -> str:
    """Bars for the documents of each length, a line for their tokens."""
    if not len(held.lengths):
        return card(escape(held.source), "no document is left to train on")
    borders = bins(int(held.lengths.max()), 3)
    counts, tokens = (part / part.sum() for part in histogram(held.lengths, borders))
    plot = Plot(found, max(counts.max(), tokens.max()))
    for at in np.flatnonzero(counts):
        begin, end = borders[at : at + 2].tolist()
        about = f"{begin:,} to {end - 1:,} tokens: {counts[at]:.2%} of documents, {tokens[at]:.2%} of tokens"
        plot.bar(begin, end, counts[at], colour(number), about)
    plot.line(np.repeat(borders, 2)[1:-1], np.repeat(tokens, 2), "var(--ink)")
    names = {"share of documents": colour(number), "share of tokens": "var(--ink)"}
    return card(escape(held.source), plot, legend(names))


def cumulative_card(found: Findings) -> str:
    plot = Plot(found, 1.0)
    for number, held in enumerate(found.holdings):
        borders = bins(int(held.lengths.max(initial=1)), 8)
        tokens = histogram(held.lengths, borders)[1]
        plot.line(borders, [0.0, *tokens.cumsum() / max(1, tokens.sum())], colour(number))
    names = {held.source: colour(number) for number, held in enumerate(found.holdings)}
    return card("tokens in documents up to this length", plot, legend(names))


def row(boxes: list[Box], seq_len: int, link: str = "") -> str:
    """A sequence as a row of boxes, which may link to the documents."""
    drawn, at = [], 0
    for number, box in enumerate(boxes):
        kind = "whole" if box.whole else "part"
        place = f'x="{at}" width="{box.tokens}" height="1" style="--own:{colour(number)}"'
        shape = f'<rect class="{kind}" {place}><title>{box.tokens:,} tokens</title></rect>'
        drawn.append(f'<a href="#{link}-{number + 1}">{shape}</a>' if link else shape)
        at += box.tokens
    view = f'viewBox="0 0 {seq_len} 1" preserveAspectRatio="none"'
    return f'<svg class="row" {view}>{"".join(drawn)}</svg>'


def packing_card(packing: Packing) -> str:
    """The first sequences of a window."""
    stage, most = packing.stage, max(1, int(MOST_BOXES / packing.documents))
    phase = f"{stage.name}, " if stage.name else ""
    about = f"{phase}{stage.seq_len:,} tokens, {packing.efficiency:.2%} text"
    rows = (row(boxes, stage.seq_len) for boxes in packing.rows[:most])
    return card(f"{escape(packing.source)} <small>{escape(about)}</small>", *rows)


def sample_card(number: int, sample: Sample) -> str:
    """A sequence as text."""
    about = f"{sample.source}, {sample.seq_len:,} tokens, {sample.padding:,} of them padding"
    shown = [row(sample.boxes, sample.seq_len, f"s{number}")]
    for at, document in enumerate(sample.documents):
        first, *others = heading(sample, at)
        title = f"{first} <small>· {escape(' · '.join(others))}</small>"
        text = "".join(f'<span class="{kind}">{escape(part)}</span>' for part, kind in document.runs)
        begin = f'<article id="s{number}-{at + 1}" style="--own:{colour(at)}">'
        shown.append(f"{begin}<h4>{title}</h4><pre>{text}</pre></article>")
    if more := len(sample.boxes) - len(sample.documents):
        shown.append(f'<p class="gap">··· {more:,} more documents ···</p>')
    return card(f"sequence {number} <small>{escape(about)}</small>", *shown, tag="section")
