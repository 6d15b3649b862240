"""Does training in FP8 and FP4 end where training in bf16 does? Runs of several seeds, compared.

python -m tests.bench.precision --runs runs/precision --experiment laptop --out tests/bench/results/NAME
python -m tests.bench.precision --runs runs/precision --experiment nano --jobs 5 --out ... train.steps=1000

Trains bf16 with three seeds, whose spread is the noise, and fp8 and fp4_qat with the first ones, each run in
a folder PRECISION-SEED of --runs; what is finished there is not trained again. Writes NAME.jsonl, every run's
losses, and NAME.png, and prints the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

from tests.bench.runs import run_all
from train.metrics import read_lines

ORDER = ("bf16", "fp8", "fp4_qat")
SMOOTH = 10  # steps that a point of a curve is the mean of


def result(folder: Path, precision: str, seed: int, experiment: str) -> dict[str, Any]:
    """What is kept of a run: training losses, every SMOOTH steps their mean, and validation losses."""
    lines = read_lines(folder / f"{precision}-{seed}" / "metrics.jsonl")
    losses = [line["lm"] for line in lines if "lm" in line]
    points = [mean(losses[i : i + SMOOTH]) for i in range(0, len(losses), SMOOTH)]
    valid = {line["step"]: line["valid_lm"] for line in lines if "valid_lm" in line}
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "bench": "precision",
        "experiment": experiment,
        "precision": precision,
        "seed": seed,
        "steps": len(losses),
        "tokens": lines[-1].get("tokens") or next(x["tokens"] for x in reversed(lines) if "tokens" in x),
        "valid_lm": valid[max(valid)],
        "valid": valid,
        "losses": [round(x, 5) for x in points],
        "device": kind,
        "torch": torch.__version__,
    }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Rows of Markdown: final validation losses, and how far from the mean of bf16."""
    of = {name: [r for r in results if r["precision"] == name] for name in ORDER}
    plain = [r["valid_lm"] for r in of["bf16"]]
    rows = [
        "| experiment | precision | seeds | validation loss | mean over bf16's | same seed over bf16's |"
        " same batches, last half |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in of.items():
        twins = {r["seed"]: r["valid_lm"] for r in of["bf16"]}
        losses = [r["valid_lm"] for r in runs]
        pairs = [f"{r['valid_lm'] / twins[r['seed']] - 1:+.2%}" for r in runs if r["seed"] in twins]
        halves = [late(r, other) for r in runs for other in of["bf16"] if other["seed"] == r["seed"]]
        apart = " ".join(f"{middle:+.2%} ± {error:.2%}" for middle, error in halves)
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        ratio = f"{mean(losses) / mean(plain) - 1:+.2%}"
        if name == "bf16":
            ratio, pairs, apart = f"±{(max(plain) - min(plain)) / 2 / mean(plain):.2%}", [], ""
        what = f"{runs[0]['experiment']}, {runs[0]['steps']} steps"
        rows.append(f"| {what} | {name} | {len(runs)} | {shown} | {ratio} | {' '.join(pairs)} | {apart} |")
    return rows


def late(run: dict[str, Any], twin: dict[str, Any]) -> tuple[float, float]:
    """How far the training losses of a run's last half are above those of its twin, on the same batches: mean
    and standard error of the curves' points."""
    half = len(run["losses"]) // 2
    apart = [x / y - 1 for x, y in zip(run["losses"][half:], twin["losses"][half:])]
    return mean(apart), (stdev(apart) if len(apart) > 1 else 0.0) / math.sqrt(len(apart))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Training losses over steps, and their distance from bf16 with the same seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    twins = {r["seed"]: r["losses"] for r in results if r["precision"] == "bf16"}
    colors = dict(zip(ORDER, ("tab:gray", "tab:blue", "tab:red")))
    for r in results:
        steps = [SMOOTH * (i + 0.5) for i in range(len(r["losses"]))]
        style = {"color": colors[r["precision"]], "linewidth": 1.0}
        left.plot(steps, r["losses"], label=f"{r['precision']}, seed {r['seed']}", **style)
        if r["precision"] != "bf16" and r["seed"] in twins:
            apart = [100 * (x / y - 1) for x, y in zip(r["losses"], twins[r["seed"]])]
            right.plot(steps, apart, label=f"{r['precision']}, seed {r['seed']}", **style)
    left.set(xlabel="step", ylabel="loss, nats per token")
    right.set(xlabel="step", ylabel="% above bf16 with the same seed")
    right.axhline(0, color="tab:gray", linewidth=1.0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--experiment", default="laptop")
    parser.add_argument("--seeds", type=int, default=1, help="of fp8 and fp4_qat; bf16 has three or as many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on the GPUs in turn")
    parser.add_argument("--out", type=Path, required=True)
    options, overrides = parser.parse_known_args()
    seeds = {name: range(options.seeds) for name in ORDER} | {"bf16": range(max(3, options.seeds))}
    every = [(name, seed) for name in ORDER for seed in seeds[name]]
    keys = [f"experiment={options.experiment}", *overrides]
    runs = {f"{name}-{seed}": [*keys, f"precision={name}", f"train.seed={seed}"] for name, seed in every}
    run_all(options.runs, runs, options.jobs)
    results = [result(options.runs, *run, options.experiment) for run in every]
    options.out.with_suffix(".jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in results))
    plot(results, options.out.with_suffix(".png"))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
