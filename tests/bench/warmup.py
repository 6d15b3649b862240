"""What the indexer's warm-up is worth: from dense to sparse attention, the indexer alone between or not.

    python -m tests.bench.warmup --runs runs/warmup --jobs 2 --out tests/bench/results/NAME experiment=nano \\
        train.seq_len=2048 model.index_topk=64

One run trains the model densely, while the indexer does not learn; two go on from its last checkpoint: one
trains the indexer alone before sparse attention, one does not. Writes NAME.jsonl, what each run was in every
validation (steps of the warm-up do not train the model: `model_step` leaves them out), and NAME.png, and
prints a table. Recall is the share of attention to entries that goes to the selected ones (train/README.md);
`best` is that of the best selection, `chance` that of a random selection under even attention. One entry in
eight or fewer is to be selected, or there is little to learn.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure

from configs.compose import compose
from tests.bench.runs import FINISHED, run_all
from train.metrics import read_lines

RUNS = {"with": ("dense", "warmup", "sparse"), "without": ("dense", "sparse")}


def phases(steps: dict[str, int], *chosen: str) -> list[str]:
    """Configuration of a run of these phases."""
    every = {"dense": ["indexer_loss_weight=0"], "warmup": [], "sparse": []}
    keys = [f"train.steps={sum(steps[phase] for phase in chosen)}", "optim.decay_fraction=0"]
    for phase in chosen:
        parts = f"attention_mode={phase}", f"steps={steps[phase]}", *every[phase]
        keys += [f"phases.{phase}.{part}" for part in parts]
    return keys


def chance(slots: int, topk: int) -> float:
    """Mean over queries that see more than top-k of `slots` entries of the share that top-k are of these."""
    return mean(topk / seen for seen in range(topk + 1, slots + 1))


def result(folder: Path, name: str, steps: dict[str, int], keys: list[str]) -> dict[str, Any]:
    """What is kept of a run."""
    config = compose(keys)
    slots = config.train.seq_len // config.model.compress_rates["compressed_sparse_attention"]
    rows = []
    for line in read_lines(folder / name / "metrics.jsonl"):
        if "valid_lm" in line:
            alone = min(max(line["step"] - steps["dense"], 0), steps["warmup"]) if name == "with" else 0
            kinds = ("step", "valid_lm", "valid_indexer", "indexer_recall", "indexer_recall_best")
            rows.append({"model_step": line["step"] - alone} | {k: line[k] for k in kinds if k in line})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "bench": "warmup", "run": name, "steps": steps, "keys": keys, "slots": slots,
        "topk": config.model.index_topk, "chance": chance(slots, config.model.index_topk),
        "valid": rows, "device": device, "torch": torch.__version__,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> list[str]:
    """Rows of Markdown: recall where the warm-up begins and ends, losses after the switch."""
    dense, alone = (results[0]["steps"][phase] for phase in ("dense", "warmup"))
    lines = [
        "| validation | steps of the model | loss with warm-up | without | recall with | without | best |"
    ]
    lines.append("|" + "---|" * 7)
    first, second = ({row["step"]: row for row in r["valid"]} for r in results)
    for step, row in first.items():
        twin = second.get(row["model_step"]) if step <= dense or step > dense + alone else None
        shown = [f"{row['valid_lm']:.4f}", f"{twin['valid_lm']:.4f}" if twin else ""]
        shown += [f"{r['indexer_recall']:.3f}" if r and "indexer_recall" in r else "" for r in (row, twin)]
        best = f"{row['indexer_recall_best']:.3f}" if "indexer_recall_best" in row else ""
        lines.append(f"| step {step} | {row['model_step']} | {' | '.join([*shown, best])} |")
    return [*lines, "", f"chance {results[0]['chance']:.3f}"]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Recall over all steps, and validation losses over the model's."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for r, color in zip(results, ("tab:blue", "tab:red")):
        rows, label = r["valid"], f"{r['run']} warm-up"
        seen = [row for row in rows if "indexer_recall" in row]
        left.plot([x["step"] for x in seen], [x["indexer_recall"] for x in seen], color=color, label=label)
        right.plot([x["model_step"] for x in rows], [x["valid_lm"] for x in rows], color=color, label=label)
    left.axhline(results[0]["chance"], color="tab:gray", linestyle=":", label="chance")
    left.set(xlabel="step", ylabel="recall of attention to entries", ylim=(0, 1))
    right.set(xlabel="step of the model", ylabel="validation loss, nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument(
        "--steps", type=int, nargs=3, default=[600, 200, 200], metavar=("DENSE", "ALONE", "SPARSE")
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on the GPUs in turn")
    parser.add_argument("--out", type=Path, required=True)
    options, overrides = parser.parse_known_args()
    steps = dict(zip(("dense", "warmup", "sparse"), options.steps))
    run_all(options.runs, {"dense": [*overrides, *phases(steps, "dense")]}, jobs=1)
    runs = {name: [*overrides, *phases(steps, *chosen)] for name, chosen in RUNS.items()}
    for name in runs:
        if not (options.runs / name).exists():
            begun = options.runs / f"{name}.copy"
            shutil.copytree(
                options.runs / "dense", begun, ignore=shutil.ignore_patterns(FINISHED), dirs_exist_ok=True
            )
            begun.rename(options.runs / name)
    run_all(options.runs, runs, options.jobs)
    results = [result(options.runs, name, steps, keys) for name, keys in runs.items()]
    options.out.with_suffix(".jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in results))
    plot(results, options.out.with_suffix(".png"))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
