"""The run as a picture: losses, learning rate and gradient norms, expert balance, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.metrics import read_lines
from train.tally import POSITIONS

Lines = list[dict[str, Any]]


def plot_run(folder: Path) -> Path:
    """Draw `folder`/metrics.jsonl and timing.jsonl into `folder`/curves.png; returns that path."""
    metrics, timing = read_lines(folder / "metrics.jsonl"), read_lines(folder / "timing.jsonl")
    figure = Figure(figsize=(12, 7), layout="constrained")
    (losses, balance), (rates, times) = figure.subplots(2, 2, sharex=True)
    _losses(losses, metrics)
    _balance(balance, metrics)
    _rates(rates, metrics)
    _times(times, timing)
    for axes in (losses, balance, rates, times):
        axes.grid(alpha=0.3)
    for axes in (rates, times):
        axes.set_xlabel("step")
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _losses(axes: Axes, metrics: Lines) -> None:
    _draw(axes, metrics, "lm", alpha=0.7)
    _draw(axes, metrics, "mtp", alpha=0.7)
    _draw(axes, metrics, "valid_lm", "lm, validation", marker="o", ms=3)
    for name in _names(metrics, "valid_lm/"):
        source = name.removeprefix("valid_lm/")
        if source not in POSITIONS:
            _draw(axes, metrics, name, source, linestyle=":")
    axes.set_ylabel("nats per token")
    _legend(axes)


def _rates(axes: Axes, metrics: Lines) -> None:
    for name in _names(metrics, "grad_norm_"):
        _draw(axes, metrics, name, name.removeprefix("grad_norm_"), alpha=0.7)
    axes.set(ylabel="gradient norm", yscale="log")
    _legend(axes, title="gradient norm of")
    right = axes.twinx()
    _draw(right, metrics, "lr", color="tab:red")
    right.set_ylabel("learning rate", color="tab:red")


def _balance(axes: Axes, metrics: Lines) -> None:
    """The worst router's load, and the entropy of every router's."""
    _draw(axes, metrics, "max_load", color="tab:purple")
    axes.set_ylabel("max load over mean, worst router", color="tab:purple")
    right = axes.twinx()
    for name in _names(metrics, "load_entropy/"):
        _draw(right, metrics, name, color="tab:green", alpha=0.5, linewidth=0.7)
    right.set_ylabel("entropy of load, each router", color="tab:green")


def _times(axes: Axes, timing: Lines) -> None:
    """Seconds of the parts on top of one another, so that their upper edge is the step."""
    steps = [line for line in timing if "seconds/step" in line]
    parts = [name for name in _names(steps, "seconds/") if name != "seconds/step"]
    if steps:
        heights = [[line.get(part, 0.0) for line in steps] for part in parts]
        labels = [part.removeprefix("seconds/") for part in parts]
        axes.stackplot([line["step"] for line in steps], heights, labels=labels, alpha=0.7)
        top = sorted(line["seconds/step"] for line in steps)[int(0.98 * (len(steps) - 1))]
        axes.set_ylim(0, 1.3 * top)  # the first steps compile and allocate
    axes.set_ylabel("seconds of a step")
    _legend(axes, loc="lower left")
    right = axes.twinx()
    _draw(right, timing, "tokens_per_s", color="black")
    right.set_ylabel("tokens per second, line")
    right.set_ylim(bottom=0)


def _draw(axes: Axes, lines: Lines, name: str, label: str | None = None, **style: Any) -> None:
    """The value `name` over steps, of the lines that have it."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    axes.plot(*zip(*points, strict=True), label=label or name, **{"linewidth": 1.0, **style})


def _names(lines: Lines, prefix: str) -> list[str]:
    """Names with this prefix, in the order in which they first appear."""
    return list(dict.fromkeys(name for line in lines for name in line if name.startswith(prefix)))


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **options)
