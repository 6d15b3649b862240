"""Predicted and measured memory of training steps, and their seconds.

    python -m tests.bench.memory [--out FILE]                      every case below, each in its own process
    python -m tests.bench.memory [--out FILE] experiment=nano ...  one case: Hydra overrides, as for training
    python -m tests.bench.memory --recompute [--out FILE] [...]    steps of 1 micro-batch, each recomputation:
                                                                   ref_1b7 at two lengths or these overrides
    python -m tests.bench.memory --precision [--out FILE]          2 steps of 1 micro-batch in each precision:
                                                                   two models at two lengths, one process

Every line of JSON has the prediction by category and, for every stage, its seconds and the most bytes that
were allocated to tensors and reserved from the driver: `build` (the engine), then in every step `micro_1` and
on (forward and backward) and `step` (the optimizer). Moments are made in the first step, which warms up;
`seconds` is the median of the others. Random tokens; the bytes do not depend on them. `parallel=single` is
the bare engine, `parallel=zero` DeepSpeed's; under torchrun rank 0 prints. Without a GPU a `MemTracker`
counts, which is slow: for trying this program with a tiny model.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.compose import compose
from model.kernels.gpu import has_kernels, planned_for_kernels
from model.precision import NAMED
from train.build import build_engine, make_mesh
from train.config import RunConfig
from train.memory import MemTracker, bucket_bytes, predict
from train.ranks import Ranks, join
from train.recompute import HOW

MODELS = (
    "experiment=nano",
    "experiment=nano train.compile=false",
    "experiment=ref_1b7 train.micro_batch=1",
    "experiment=ref_1b7 train.micro_batch=2",
    "experiment=ref_1b7 train.micro_batch=1 model.num_nextn_predict_layers=0",
    "experiment=ref_1b7 train.micro_batch=2 model.num_nextn_predict_layers=0 train.compile=false",
)
CASES = [f"{case} parallel={engine}" for engine in ("single", "zero") for case in MODELS]
LENGTHS = [
    f"experiment=ref_1b7 train.compile=false train.micro_batch=1 train.seq_len={length} parallel=single"
    for length in (4096, 16384)
]
PRECISIONS = [
    f"experiment={model} train.compile=false train.micro_batch=1 train.seq_len={length} parallel=single"
    f" precision={precision}"
    for model in ("ref_1b7 model.num_nextn_predict_layers=0", "nano")
    for length in (4096, 16384)
    for precision in NAMED
]


def random_batch(config: RunConfig, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens [rows, S], one document a row."""
    length, depth = config.train.seq_len, config.model.num_nextn_predict_layers
    ids = torch.randint(config.model.vocab_size, (rows, length + 1 + depth), device=device)
    position = torch.arange(length, device=device).expand(rows, -1).contiguous()
    further = [ids[:, i : i + length] for i in range(2, 2 + depth)]
    return {
        "input_ids": ids[:, :length].contiguous(),
        "labels": ids[:, 1 : 1 + length].contiguous(),
        "position_ids": position,
        "document_ids": torch.zeros_like(position),
        "next_ids": torch.stack(further, -1) if further else position.new_zeros(rows, length, 0),
    }


def stages(
    config: RunConfig, ranks: Ranks, micros: int, steps: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured, in order: name and work."""
    engines = []
    mesh = make_mesh(config, ranks)
    yield "build", lambda: engines.append(build_engine(config, ranks.device, mesh))
    (engine,) = engines
    engine.activate(config.trained_sets)
    engine.use(config.precision.at(config.precision.qat_start))

    def micro_batch(last: bool) -> None:
        options: dict[str, Any] = {"mode": config.attention_mode, "indexer_loss": config.indexer_loss}
        output = engine(random_batch(config, config.train.micro_batch, ranks.device), **options)
        engine.backward(torch.stack([loss for loss, _ in output.losses.values()]).sum(), last)

    for step in range(1, steps + 1):
        for micro in range(1, micros + 1):
            yield f"micro_{micro}_of_step_{step}", partial(micro_batch, micro == micros)
        yield f"step_{step}", lambda: engine.step(1e-4, measure=True)


def on_gpu(work: Callable[[], object]) -> dict[str, float]:
    """Seconds and bytes of `work`, by CUDA's allocator."""
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - began,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "left": torch.cuda.memory_allocated(),
    }


def on_cpu(work: Callable[[], object], tracker: MemTracker) -> dict[str, float]:
    """Seconds and bytes of `work`, by the tracker that has seen everything before."""
    tracker.restart()
    began = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - began, "allocated": tracker.peak, "left": tracker.live}


def measure(overrides: list[str], micros: int, steps: int) -> dict[str, Any]:
    """One case on this rank; bytes, seconds, and the prediction over the measured peak."""
    config = compose(overrides)
    ranks = join(config.train.device)
    cuda = ranks.device.type == "cuda"
    sharers = ranks.world // config.parallel.cp
    torch.manual_seed(ranks.rank // config.parallel.cp)  # ranks that share rows out take the same
    tokens = config.train.seq_len * config.train.micro_batch * micros * sharers
    config = replace(config, train=replace(config.train, batch_tokens=tokens))
    with planned_for_kernels(has_kernels(ranks.device)):
        mesh = make_mesh(config, ranks)
        memory = predict(config, mesh, bucket_bytes(config, mesh, ranks.device))
    found: dict[str, Any] = {"case": " ".join(overrides), "world": ranks.world, "batch_tokens": tokens}
    found |= {"device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__}
    found |= {
        "predicted": {k: n for k, n in vars(memory).items() if k != "mesh"},
        "predicted_total": memory.total,
        "error": None,
    }
    measured: dict[str, dict[str, float]] = {}
    try:
        with nullcontext() if cuda else MemTracker("cpu") as tracker:
            for name, work in stages(config, ranks, micros, steps):
                measured[name] = on_gpu(work) if tracker is None else on_cpu(work, tracker)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        found["error"] = "out of memory"
    found["measured"] = measured
    found["measured_total"] = max((stage["allocated"] for stage in measured.values()), default=0)
    if not found["error"]:
        found["predicted_over_measured"] = round(memory.total / found["measured_total"], 4)
        found["seconds"] = step_seconds(measured, steps)
        found["tokens_per_s"] = round(tokens / found["seconds"], 1)
    return found if ranks.first else {}


def step_seconds(measured: dict[str, dict[str, float]], steps: int) -> float:
    """Median seconds of a whole step, of all steps but the first."""
    times = [
        sum(stage["seconds"] for name, stage in measured.items() if name.endswith(f"step_{step}"))
        for step in range(2, steps + 1)
    ]
    return round(statistics.median(times), 4)


def out_of_memory(error: RuntimeError) -> bool:
    """Of torch, or of a library that asks for memory of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def cases(overrides: list[str], recompute: bool) -> list[list[str]]:
    """The overrides of every process to start."""
    if not recompute:
        return [case.split() for case in CASES]
    bases = [overrides] if overrides else [case.split() for case in LENGTHS]
    return [[*base, f"train.recompute={how}"] for base in bases for how in HOW]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--recompute", action="store_true", help="compare the values of train.recompute")
    parser.add_argument("--precision", action="store_true", help="compare numbers to multiply")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step")
    parser.add_argument("--steps", type=int, default=3, help="2 or more; the first warms up")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    args = parser.parse_args()
    if args.precision:
        for overrides in PRECISIONS:
            write(measure(overrides.split(), micros=1, steps=2), args.out)
            gc.collect()  # of an engine whose hooks know each other
            torch.cuda.empty_cache()
        return
    if args.recompute or not args.overrides:
        options = ["--micro-batches", "1", "--steps", "4"] if args.recompute else []
        options += ["--out", str(args.out)] if args.out else []
        for case in cases(args.overrides, args.recompute):
            subprocess.run([sys.executable, "-m", "tests.bench.memory", *options, *case], check=False)
        return
    found = measure(args.overrides, args.micro_batches, args.steps)
    if found:
        write(found, args.out)


def write(found: dict[str, Any], out: Path | None) -> None:
    line = json.dumps(found)
    print(line, flush=True)
    if out:
        with out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
