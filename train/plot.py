"""The run as a picture: losses, learning rate and gradient norm over steps."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure


def plot_run(folder: Path) -> Path:
    """Draw `folder`/metrics.jsonl into `folder`/curves.png; returns that path."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lm" in line]
    valid = [line for line in lines if "valid_lm" in line]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rest = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for part in ("lm", "mtp"):
        if steps and part in steps[0]:
            losses.plot([s["step"] for s in steps], [s[part] for s in steps], lw=1, alpha=0.7, label=part)
    losses.plot([v["step"] for v in valid], [v["valid_lm"] for v in valid], "o-", label="lm, validation")
    losses.set_ylabel("nats per token")
    losses.legend()
    rest.plot([s["step"] for s in steps], [s["grad_norm_model"] for s in steps], lw=1, color="tab:gray")
    rest.set(xlabel="step", ylabel="gradient norm")
    rate = rest.twinx()
    rate.plot([s["step"] for s in steps], [s["lr"] for s in steps], color="tab:red")
    rate.set_ylabel("learning rate", color="tab:red")
    for axes in (losses, rest):
        axes.grid(alpha=0.3)
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    return path
